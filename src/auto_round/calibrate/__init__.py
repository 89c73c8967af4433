"""From a description of text to token ids, and from token ids to what every block sees."""

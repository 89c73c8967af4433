"""What the user asks for, as frozen and validated data: schemes, recipes, presets and the plan of a model."""

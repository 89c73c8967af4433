"""generate, chat and backends on a tiny quantised folder."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from tests.cli.test_end_to_end import rounded

from auto_round.cli.dispatch import dispatch
from auto_round.inference.compiled import compile_decoding


@pytest.fixture(scope="module")
def folder(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama in 4 bits."""
    output = tmp_path_factory.mktemp("rounded") / "out"
    assert rounded(llama_folder, output, "--quiet") == 0
    return output


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as stop:
        dispatch("auto-round", "default", words)
    return int(stop.value.code or 0)


def test_generate_shows_the_text_and_its_speed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--prompt", "Once", "--max_new_tokens", "5", "--device", "cpu"]
    assert run("generate", str(folder), *words) == 0
    text = capsys.readouterr().out
    assert text.startswith("Once")
    assert "4 tokens read at" in text
    assert "written at" in text


def test_generate_takes_backends_by_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--prompt", "a", "--max-new-tokens", "2", "--device", "cpu"]
    assert run("generate", str(folder), *words, "--backend", "torch") == 0
    assert run("generate", str(folder), *words, "--backend", "marlin") == 2
    assert "marlin: it runs on CUDA devices, not on cpu" in capsys.readouterr().err
    assert run("generate", str(folder / "nothing"), *words) == 2
    assert "no config.json" in capsys.readouterr().err
    assert run("generate", str(folder)) == 2


def test_compiled_steps_write_the_same_text(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["generate", str(folder), "--prompt", "Once", "--max_new_tokens", "5", "--device", "cpu"]
    graphs: list[object] = []

    def without_inductor(model: object) -> None:
        compile_decoding(model, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)

    monkeypatch.setattr("auto_round.inference.compiled.compile_decoding", without_inductor)
    assert run(*words, "--compile") == 0
    compiled = capsys.readouterr().out
    assert len(graphs) == 1
    assert run(*words) == 0
    assert capsys.readouterr().out.splitlines()[0] == compiled.splitlines()[0]


def test_chat_answers_until_an_empty_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nand you\n\n"))
    assert run("chat", str(folder), "--max_new_tokens", "3", "--device", "cpu") == 0
    assert capsys.readouterr().out.count("written at") == 2


def test_backends_lists_all_with_their_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("backends", "--device", "cpu", "--scheme", "W3A16G64_asym") == 0
    text = capsys.readouterr().out
    assert "W3A16G64 asym" in text
    for name in ("native", "torch_reference", "marlin", "exllamav2", "triton", "int4pack", "ark"):
        assert name in text


@pytest.mark.parametrize("word", ["generate", "chat", "backends"])
def test_help(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(word, "--help") == 0
    text = capsys.readouterr().out
    assert f"Usage: auto-round {word}" in text
    assert "{" not in text


@pytest.mark.parametrize("method", ["fake", "llm_compressor"])
def test_folders_of_other_readers_are_opened_by_them_or_told_why_not(
    llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    assert rounded(llama_folder, tmp_path / "out", "--quiet", "--format", method) == 0
    words = ["generate", str(tmp_path / "out"), "--prompt", "Once", "--max_new_tokens", "3", "--device", "cpu"]
    code = run(*words)
    if method == "fake":
        assert code == 0
    elif code:  # compressed-tensors is not among this project's packages
        assert code == 2
        assert "compressed" in capsys.readouterr().err
    assert run(*words, "--lm_head_bits", "8") == 2
    assert "--lm_head_bits are for folders of AutoRound" in " ".join(capsys.readouterr().err.split())


def test_commands_in_the_help_of_other_recipes_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        dispatch("auto-round-best", "best", ["--help"])
    text = capsys.readouterr().out
    assert "auto-round inspect" in text
    assert "auto-round-best inspect" not in text
    assert "auto-round-best plan" in text

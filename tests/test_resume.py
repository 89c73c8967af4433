"""A run that is killed goes on where it stopped, and ends in the same bytes."""

from __future__ import annotations

import hashlib
import random
import shutil
from pathlib import Path

import pytest

from auto_round import AutoRound
from auto_round.calibrate import corpora
from auto_round.calibrate.documents import Corpus
from auto_round.conversion import convert
from auto_round.errors import OutputError
from auto_round.runtime.workspace import work_folder, workspace
from tests import killing
from tests.conftest import tiny_llama, tiny_tokenizer

BLOCKS = 3
RECORD = "auto_round.json"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(num_hidden_layers=BLOCKS).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert killing.runs([{"model": str(model), "output": str(folder / "out"), "log": str(folder / "log")}]) == [0]
    return hashes(folder / "out")


@pytest.mark.parametrize(
    ("overwrite", "step"),
    [
        (False, 2),
        pytest.param(False, 1, marks=pytest.mark.slow),
        pytest.param(True, 1, marks=pytest.mark.slow),
    ],
    ids=["every-second", "every", "overwriting"],
)
def test_death_at_any_call_to_the_disk(
    model: Path, undisturbed: dict[str, str], tmp_path: Path, overwrite: bool, step: int
) -> None:
    """Every run is killed one call later than the one before, so that each of them happens with each state left."""
    if overwrite:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").write_text("an older result")
    saving = {"overwrite": overwrite, "enable_check": False}
    job = {"model": str(model), "output": str(tmp_path / "out"), "log": str(tmp_path / "log"), "saving": saving}
    deaths = [{**job, "call": call} for call in range(1, 26, step)]
    codes = killing.runs([*deaths, job])
    assert codes.count(killing.KILLED) >= len(deaths) / 2
    assert set(codes) <= {killing.KILLED, 0}
    assert codes[-1] == 0
    # The record alone differs: it keeps the comparison with the original, which is left out here for its time.
    assert {**hashes(tmp_path / "out"), RECORD: undisturbed[RECORD]} == undisturbed
    if not overwrite:  # an overwriting command that has finished begins anew when it is typed again
        assert killing.wasted(tmp_path / "log") <= codes.count(killing.KILLED)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["log", "out"]


@pytest.mark.slow
def test_death_at_random_moments(model: Path, undisturbed: dict[str, str], tmp_path: Path) -> None:
    random.seed(7)
    jobs, ends = [], []
    for place in range(3):
        job = {"model": str(model), "output": str(tmp_path / f"out{place}"), "log": str(tmp_path / f"log{place}")}
        jobs += [{**job, "after": random.uniform(0.05, 0.8)} for _ in range(3)] + [job]
        ends.append(len(jobs) - 1)
    codes = killing.runs(jobs)
    assert killing.KILLED in codes
    assert [codes[end] for end in ends] == [0, 0, 0]
    for place in range(3):
        assert hashes(tmp_path / f"out{place}") == undisturbed
        assert killing.wasted(tmp_path / f"log{place}") <= 3


def interrupted(model: Path, output: Path, **changes: object) -> None:
    """A run that Ctrl-C ends after its first block."""

    class Impatient:
        def __getattr__(self, name: str) -> object:
            return lambda *_: None

        def block_finished(self, stats: object) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        AutoRound(model, **{**killing.SETTINGS, **changes}, listener=Impatient()).quantize_and_save(output)


def test_another_job_is_refused_and_told_what_differs(model: Path, tmp_path: Path) -> None:
    interrupted(model, tmp_path / "out")
    other = AutoRound(model, **{**killing.SETTINGS, "seed": 43, "bits": 2})
    with pytest.raises(OutputError, match=r"recipe seed: 42 there, 43 here(.|\n)*scheme(.|\n)*--overwrite"):
        other.quantize_and_save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    other.quantize_and_save(tmp_path / "out", overwrite=True)
    assert not work_folder(tmp_path / "out").exists()
    with pytest.raises(OutputError, match="not empty"):
        AutoRound(model, **killing.SETTINGS).quantize_and_save(tmp_path / "out")


def test_other_weights_of_the_same_shapes_are_another_job(model: Path, tmp_path: Path) -> None:
    interrupted(model, tmp_path / "out")
    changed = tiny_llama(num_hidden_layers=BLOCKS)
    changed.model.layers[2].mlp.up_proj.weight.data[0, 0] += 1
    changed.save_pretrained(tmp_path / "changed")
    tiny_tokenizer().save_pretrained(tmp_path / "changed")
    with pytest.raises(OutputError, match="weights sha256"):
        AutoRound(tmp_path / "changed", **killing.SETTINGS).quantize_and_save(tmp_path / "out")


def test_a_damaged_block_is_done_again(model: Path, undisturbed: dict[str, str], tmp_path: Path) -> None:
    interrupted(model, tmp_path / "out")
    (file,) = (work_folder(tmp_path / "out") / "blocks").glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    AutoRound(model, **killing.SETTINGS).quantize_and_save(tmp_path / "out")
    assert hashes(tmp_path / "out").keys() == undisturbed.keys()
    assert hashes(tmp_path / "out")["model.safetensors"] == undisturbed["model.safetensors"]


def test_the_same_command_again_does_nothing(model: Path, tmp_path: Path) -> None:
    first = AutoRound(model, **killing.SETTINGS).quantize_and_save(tmp_path / "out")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    second = AutoRound(model, **killing.SETTINGS).quantize_and_save(tmp_path / "out")
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()} == before
    assert (second.folders, second.bytes_after) == (first.folders, first.bytes_after)
    (tmp_path / "out" / "model.safetensors").write_bytes(b"")
    with pytest.raises(OutputError, match="not empty"):
        AutoRound(model, **killing.SETTINGS).quantize_and_save(tmp_path / "out")


def test_two_processes_on_one_output(model: Path, tmp_path: Path) -> None:
    with workspace(tmp_path / "out"), pytest.raises(OutputError, match=r"process \d+ on .* is at work"):
        AutoRound(model, **killing.SETTINGS).quantize_and_save(tmp_path / "out")
    AutoRound(model, **killing.SETTINGS).quantize_and_save(tmp_path / "out")


def test_a_measured_dtype_is_kept_when_the_run_goes_on(model: Path, tmp_path: Path) -> None:
    interrupted(model, tmp_path / "out", compute_dtype="auto")
    work = work_folder(tmp_path / "out")
    text = (work / "job.json").read_text()
    other = {"float32": "bfloat16", "bfloat16": "float32"}
    measured = next(name for name in other if f'"compute_dtype": "{name}"' in text)
    (work / "job.json").write_text(text.replace(f'"{measured}"', f'"{other[measured]}"'))
    report = AutoRound(model, **{**killing.SETTINGS, "compute_dtype": "auto"}).quantize_and_save(tmp_path / "out")
    assert report.compute_dtype == other[measured]


@pytest.mark.parametrize("output", [".", "m", "link"])
def test_an_output_never_takes_its_own_source_with_it(model: Path, tmp_path: Path, output: str) -> None:
    shutil.copytree(model, tmp_path / "home" / "m")
    (tmp_path / "home" / "link").symlink_to(tmp_path / "home" / "m")
    before = hashes(tmp_path / "home")
    tuner = AutoRound(tmp_path / "home" / "m", **killing.SETTINGS)
    with pytest.raises(OutputError, match="which is to be read"):
        tuner.quantize_and_save(tmp_path / "home" / output, overwrite=True)
    with pytest.raises(OutputError, match="which is to be read"):
        convert(tmp_path / "home" / "m", tmp_path / "home" / output, "auto_gptq", overwrite=True)
    assert hashes(tmp_path / "home") == before


def test_a_mount_point_is_refused_before_the_work(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path / "out")
    with pytest.raises(OutputError, match=r"mount point.*out/quantised"):
        AutoRound(model, **killing.SETTINGS).quantize_and_save(tmp_path / "out")


def test_an_output_behind_a_link_is_written_where_it_points(model: Path, tmp_path: Path) -> None:
    (tmp_path / "large").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "large" / "out")
    AutoRound(model, **killing.SETTINGS).quantize_and_save(tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "large" / "out" / "model.safetensors").is_file()


def test_the_set_behind_auto_is_kept_when_the_run_goes_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun without a network, gone on with one, and typed once more when it is done."""
    monkeypatch.setattr(corpora, "pile", lambda *_: Corpus(["other text " * 90] * 50, "NeelNanda/pile-10k (train)"))

    def unreachable() -> None:
        raise corpora._UnavailableError("no network")

    monkeypatch.setattr(corpora, "_check_reachable", unreachable)
    interrupted(model, tmp_path / "out", dataset="auto")
    monkeypatch.setattr(corpora, "_check_reachable", lambda: None)
    tuner = AutoRound(model, **{**killing.SETTINGS, "dataset": "auto"})
    done = tuner.quantize_and_save(tmp_path / "out")
    assert done.calibration is not None
    assert done.calibration["source"].startswith("builtin")
    assert tuner.quantize_and_save(tmp_path / "out").signature == done.signature

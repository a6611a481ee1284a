"""Files made to do harm: nothing in them runs, nothing is read or written elsewhere, and the error is a clear one."""

import json
import os
import pickle
import shutil
import signal
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import limbeck
from limbeck.cli import main
from limbeck.core import durable
from limbeck.core.checkpoint import Checkpoint, Checkpoints, read_checkpoint
from limbeck.core.durable import commit_folder, verify_folder
from limbeck.core.errors import DamagedFileError, LimbeckError, UsageError
from limbeck.core.run import Run
from tests.core.toys import build

# A checkpoint that was sealed anew does not fit its pointer any more, which is said in a warning.
pytestmark = pytest.mark.filterwarnings("ignore:.*is damaged")


class Payload:
    """What makes a folder when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.canary),)


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """What must not exist afterwards."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "a file ran code"


@pytest.fixture
def finished(undisturbed, folder) -> Path:
    """A copy of a finished run."""
    return shutil.copytree(undisturbed.folder, folder / "run")


@pytest.fixture(autouse=True)
def promptly() -> Iterator[None]:
    """A bomb may not keep the process busy either."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it took more than 20 seconds"))
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def reseal(folder: Path, **contents: bytes | None) -> None:
    """Replaces files of a committed folder (None deletes) and gives it a manifest that vouches for them."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}
    files |= {name.replace("__", "."): content for name, content in contents.items()}  # type: ignore[dict-item]
    shutil.rmtree(folder)
    commit_folder(folder, lambda new: [(new / n).write_bytes(c) for n, c in files.items() if c is not None])


# Pickles.


def pickles(canary: Path, tmp_path: Path) -> dict[str, bytes]:
    torch.save({"weight": torch.ones(1), "payload": Payload(canary)}, tmp_path / "zip")
    torch.save(Payload(canary), tmp_path / "legacy", _use_new_zipfile_serialization=False)
    return {
        "pickle": pickle.dumps(Payload(canary)),
        "torch": (tmp_path / "zip").read_bytes(),
        "old torch": (tmp_path / "legacy").read_bytes(),
    }


@pytest.mark.parametrize("kind", ["pickle", "torch", "old torch"])
def test_a_pickle_named_safetensors_in_a_checkpoint_does_not_run(kind, canary, tmp_path, tally):
    content = pickles(canary, tmp_path)[kind]
    checkpoints = Checkpoints(tmp_path / "stage")
    step = checkpoints.save(Checkpoint(1, {"method": {"w": torch.ones(2)}}, {}))
    reseal(step, method__safetensors=content)
    with tally("hostile files refused"), pytest.raises(DamagedFileError, match=r"method\.safetensors"):
        Checkpoints(tmp_path / "stage").load()


@pytest.mark.parametrize("kind", ["pickle", "torch", "old torch"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.pt", "model.ckpt"])
def test_a_pickle_among_the_student_s_weights_does_not_run(kind, name, canary, finished, tmp_path, tally):
    content = pickles(canary, tmp_path)[kind]
    student = finished / "student"
    reseal(student, **{"model__safetensors": None, name.replace(".", "__"): content})
    with tally("hostile files refused"), pytest.raises(LimbeckError, match=r"model\.safetensors|pickle"):
        limbeck.load(finished)
    # Next to whole weights it is not looked at.
    reseal(student, model__safetensors=(finished / "stages/distil/model.safetensors").read_bytes())
    if name != "model.safetensors":
        limbeck.load(finished)


CONFIGS: dict[str, dict[str, Any]] = {
    "a class": {"format": "limbeck", "version": 1, "class": "os.system"},
    "a model": {"format": "limbeck", "version": 1, "model": "os.system", "arguments": {}},
    "arguments": {"format": "limbeck", "version": 1, "model": "mlp", "arguments": {"__class__": "os.system"}},
    "huge arguments": {"format": "limbeck", "version": 1, "model": "mlp", "arguments": {"width": 10**15}},
    "code to download": {
        "model_type": "evil",
        "architectures": ["EvilModel"],
        "auto_map": {"AutoConfig": "evil.EvilConfig", "AutoModelForImageClassification": "evil.EvilModel"},
    },
    "code beside": {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification"],
        "auto_map": {"AutoConfig": "evil.EvilConfig", "AutoModelForImageClassification": "evil.EvilModel"},
    },
    "timm's checkpoint path": {
        "architecture": "resnet10t",
        "num_classes": 2,
        "model_args": {"checkpoint_path": "evil.bin"},
        "pretrained_cfg": {},
    },
    "timm's file": {
        "architecture": "resnet10t",
        "num_classes": 2,
        "pretrained_cfg": {"file": "evil.bin", "custom_load": True},
    },
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_configuration_cannot_name_code(kind, canary, finished, tmp_path, tally):
    student = finished / "student"
    evil = f"import os; os.mkdir({str(canary)!r})".encode()
    reseal(student, config__json=json.dumps(CONFIGS[kind]).encode(), evil__py=evil)
    (student / "evil.bin").write_bytes(pickle.dumps(Payload(canary)))
    with tally("hostile files refused"), pytest.raises(LimbeckError):
        limbeck.load(finished)


# A run's recipe.


def aliases(levels: int = 12, width: int = 12) -> str:
    """A few lines that stand for width ** levels values."""
    lines = ["a0: &a0 [x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels)]
    return "\n".join(lines)


def recipes(canary: Path) -> dict[str, str | bytes]:
    return {
        "a call": f'!!python/object/apply:os.mkdir ["{canary}"]',
        "a call as a value": f'seed: !!python/object/apply:os.mkdir ["{canary}"]',
        "a new object": f'!!python/object/new:os.mkdir ["{canary}"]',
        "a name": "seed: !!python/name:os.system",
        "a module": "seed: !!python/module:os",
        "a tag of its own": "!evil {}",
        "aliases that multiply": aliases(),
        "aliases that multiply in options": "stages:\n- options:\n" + textwrap.indent(aliases(), "    "),
        "an alias to itself": "stages: &a [*a]",
        "a mapping within itself": "stages: &a {b: *a}",
        "deep nesting": "[" * 50_000,
        "deep mappings": "{a: " * 50_000,
        "a huge number": "seed: " + "9" * 10_000,
        "a huge hexadecimal number": "seed: 0x" + "f" * 10_000,
        "no such date": "seed: 2023-99-99",
        "many keys": "\n".join(f"k{n}: {n}" for n in range(90_000)),
        "a list as a key": "? [a, b]\n: c",
        "no text": b"\xff\xfe\x00\x01",
        "nothing": "",
        "a list": "- seed",
        "two documents": "seed: 1\n---\nseed: 2",
        "megabytes": "#" * (2 << 20),
        "a key given twice": "seed: 1\nseed: 2",
    }


@pytest.mark.parametrize("kind", recipes(Path()))
def test_a_hostile_recipe_in_a_run_is_refused(kind, canary, finished, tally, capfd):
    text = recipes(canary)[kind]
    path = finished / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = contents(finished)
    with tally("hostile files refused"):
        with pytest.raises(DamagedFileError, match=r"recipe\.yaml"):
            Run.open(finished).recipe()
        assert main(["run", str(finished), "--resume", "--quiet"]) == UsageError.exit_code
        assert "Traceback" not in capfd.readouterr().err
        assert contents(finished) == before


# Links.


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


LINKS = [
    *("recipe.yaml", "run.json", "results.json", "metrics.jsonl", ".lock", "student", "stages", "checkpoints"),
    *("student/model.safetensors", "stages/teach", "checkpoints/distil", "checkpoints/distil/latest.json"),
    *("checkpoints/distil/step-000000012", "checkpoints/distil/step-000000012/state.json", "elsewhere", "report.html"),
]


@pytest.mark.parametrize("dangling", [False, True])
@pytest.mark.parametrize("name", LINKS)
def test_a_link_out_of_the_run_is_refused_and_not_followed(name, dangling, finished, tmp_path, tally):
    place, outside = finished / name, tmp_path / "outside"
    if place.exists():
        shutil.move(place, outside)
    else:
        outside.mkdir()
    place.symlink_to(tmp_path / "nowhere" if dangling else outside)
    before, names = contents(tmp_path), sorted(os.listdir(tmp_path))
    with tally("links out of the run refused"):
        for opening in (Run.open, limbeck.load):
            with pytest.raises((UsageError, DamagedFileError)):
                opening(finished)
        assert main(["run", str(finished), "--resume", "--quiet"]) == UsageError.exit_code
        assert (contents(tmp_path), sorted(os.listdir(tmp_path))) == (before, names)


def test_links_within_the_run_and_links_in_circles(finished):
    (finished / "best").symlink_to(finished / "student")
    Run.open(finished)
    (finished / "circle").symlink_to(finished / "circle")
    Run.open(finished)


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/hostname", "sub/../../outside", "link", "linked/outside", "x" * 300, "a\0b"]
)
def test_a_manifest_cannot_point_out_of_its_folder(name, tmp_path, tally):
    (tmp_path / "outside").write_bytes(b"secret")
    target = tmp_path / "stage"
    commit_folder(target, lambda folder: (folder / "inside").write_bytes(b"secret"))
    (target / "link").symlink_to(tmp_path / "outside")
    (target / "linked").symlink_to(tmp_path)
    (target / "sub").mkdir()
    manifest = json.loads((target / "manifest.json").read_bytes())
    files = {name: manifest["files"]["inside"]}
    _write_manifest(target, files)
    with tally("links out of the run refused"), pytest.raises(DamagedFileError):
        verify_folder(target)


def _write_manifest(folder: Path, files: Any) -> None:
    sealed = {"files": files, "sha256": durable._digest_of({"files": files})}
    (folder / "manifest.json").write_text(json.dumps(sealed))


# JSON.


BOMBS: dict[str, bytes] = {
    "deep lists": b"[" * 200_000,
    "deep objects": b'{"a":' * 200_000,
    "deep and closed": b"[" * 100_000 + b"]" * 100_000,
    "a huge number": b"1" * 10_000,
    "a list": b"[1, 2]",
    "a number": b"7",
    "null": b"null",
    "nothing": b"",
    "no text": b"\xff\xfe\x00",
    "zeros": bytes(100),
}
POINTERS = {
    "another type": b'{"checkpoint": 5, "manifest": "0"}',
    "outside": b'{"checkpoint": "../../student", "manifest": "0"}',
    "too many keys": b'{"checkpoint": "step-000000012", "manifest": "0", "more": 1}',
    "odd digits": '{"checkpoint": "step-00000000\u0662", "manifest": "0"}'.encode(),
}
MANIFESTS = {
    "no list": b'{"files": 5, "sha256": "0"}',
    "no checksum": b'{"files": {}, "sha256": 7}',
    "more": b'{"files": {}, "sha256": "0", "more": 1}',
}


def read_pointer(folder: Path) -> None:
    Run(folder).checkpoints("distil", 2).check_pointer()


def read_student_manifest(folder: Path) -> None:
    verify_folder(folder / "student")


CASES: list[tuple[str, bytes, Callable[[Path], Any]]] = [
    *(("run.json", content, lambda folder: Run(folder).status()) for content in BOMBS.values()),
    *(("results.json", content, lambda folder: Run(folder).results()) for content in BOMBS.values()),
    *(("checkpoints/distil/latest.json", c, read_pointer) for c in [*BOMBS.values(), *POINTERS.values()]),
    *(("student/manifest.json", c, read_student_manifest) for c in [*BOMBS.values(), *MANIFESTS.values()]),
]


@pytest.mark.parametrize(("name", "content", "read"), CASES, ids=lambda value: "" if callable(value) else None)
def test_hostile_json_is_damage(name, content, read, finished, tally):
    (finished / name).write_bytes(content)
    with tally("hostile files refused"), pytest.raises(DamagedFileError) as caught:
        read(finished)
    assert caught.value.path == str(finished / name)


@pytest.mark.parametrize(("name", "content", "read"), CASES[:: len(BOMBS)], ids=lambda v: "" if callable(v) else None)
def test_gigabytes_of_json_are_not_read(name, content, read, finished, tally):
    os.truncate(finished / name, 5 << 30)  # a hole: it takes no room on the disk
    with tally("hostile files refused"), pytest.raises(DamagedFileError):
        read(finished)


@pytest.mark.parametrize("kind", BOMBS)
def test_hostile_json_under_a_seal_that_vouches_for_it_is_damage_too(kind, finished, tally):
    step = finished / "checkpoints/distil/step-000000012"
    reseal(step, state__json=BOMBS[kind])
    reseal(finished / "student", config__json=BOMBS[kind])
    with tally("hostile files refused"):
        with pytest.raises(DamagedFileError, match=r"state\.json"):
            read_checkpoint(step)
        with pytest.raises(DamagedFileError, match=r"config\.json"):
            limbeck.load(finished)


@pytest.mark.parametrize("kind", BOMBS)
def test_hostile_rows_of_metrics_are_passed_over(kind, finished, tally):
    path = finished / "metrics.jsonl"
    rows = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(rows[0] + BOMBS[kind] + b"\n" + b"".join(rows[1:]))
    with tally("hostile files refused"):
        assert len(Run(finished).metrics()) == len(rows)


STATE: dict[str, Any] = {"offset": 0, "logged": 1, "skipped_in_a_row": {}, "rewinds": 0, "seconds": {}}
STATES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "negative": {**STATE, "offset": -1},
    "huge": {**STATE, "offset": 10**300},
    "a fraction": {**STATE, "logged": 0.5},
    "true": {**STATE, "rewinds": True},
    "a text": {**STATE, "rewinds": "1"},
    "an unknown key": {**STATE, "__class__": "os.system"},
    "a list": {**STATE, "seconds": []},
    "no numbers": {**STATE, "seconds": {"forward": "long"}},
    "counts that are none": {**STATE, "skipped_in_a_row": {"student": None}},
}


@pytest.mark.parametrize("kind", STATES)
def test_a_hostile_state_of_the_trainer_is_damage(kind, folder, tally):
    build(checkpoints=Checkpoints(folder), steps=2).fit()
    for step in folder.glob("step-*"):
        reseal(step, state__json=json.dumps(STATES[kind]).encode())
    with tally("hostile files refused"), pytest.raises(DamagedFileError, match="state"):
        build(checkpoints=Checkpoints(folder), steps=2).fit()


HOSTILE_TENSORS: dict[str, Callable[[dict[str, dict[str, torch.Tensor]]], Any]] = {
    "a group is missing": lambda groups: groups.pop("method"),
    "a tensor is missing": lambda groups: groups["method"].pop("student.0.weight"),
    "another shape": lambda groups: groups["method"].update({"student.0.weight": torch.zeros(2, 2)}),
    "an average is missing": lambda groups: groups["average"].pop("0.weight"),
    "no optimizer": lambda groups: groups.pop("optimizer-student"),
    "a strange parameter": lambda groups: groups["optimizer-student"].update({"x/exp_avg": torch.zeros(2)}),
    # These would have the fused kernels read beyond the end of the tensor.
    "a moment too short": lambda groups: groups["optimizer-student"].update({"0.weight/exp_avg": torch.zeros(1)}),
    "a moment of one number": lambda groups: groups["optimizer-student"].update({"0.weight/exp_avg": torch.zeros(())}),
    "a moment of another type": lambda groups: groups["optimizer-student"].update(
        {"0.weight/exp_avg": groups["optimizer-student"]["0.weight/exp_avg"].bool()}
    ),
    "many steps": lambda groups: groups["optimizer-student"].update({"0.weight/step": torch.zeros(9)}),
}


@pytest.mark.parametrize("kind", HOSTILE_TENSORS)
def test_tensors_that_do_not_belong_are_damage(kind, folder, tally):
    build(checkpoints=Checkpoints(folder / "good"), steps=2, ema=0.5).fit()
    good = Checkpoints(folder / "good").load()
    HOSTILE_TENSORS[kind](good.tensors)
    Checkpoints(folder / "bad").save(good)
    with tally("hostile files refused"), pytest.raises(DamagedFileError):
        build(checkpoints=Checkpoints(folder / "bad"), steps=3, ema=0.5).fit()


@pytest.mark.parametrize("name", ["step-\u00b2", "step--1", "step-1", "step-x", "step-000000009", "step-" + "9" * 200])
def test_strange_names_among_the_checkpoints_are_not_taken_for_one(name, folder, tally):
    checkpoints = Checkpoints(folder)
    checkpoints.save(Checkpoint(3, {"method": {"w": torch.ones(2)}}, {"offset": 0}))
    (folder / name).mkdir()
    with tally("hostile files refused"):
        found = checkpoints.load()
        assert found is not None
        assert found.step == 3

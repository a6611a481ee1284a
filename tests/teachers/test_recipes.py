"""Recipes whose teachers are cached or served, from the command line."""

import json
import shutil

import pytest
import yaml
from safetensors.torch import load_file

import limbeck
from limbeck.cli import main
from limbeck.core.errors import RecipeError, UsageError
from limbeck.data.cache.errors import ForeignCacheError, MissingCacheError
from tests.methods.language import rig as language
from tests.teachers.server import serving

TRAIN = {"steps": 8, "batch_size": 16, "checkpoint_every": 2, "log_every": 4}


def distil(folder, **more):
    """A stage that distils a stored teacher, from its cache."""
    return {
        "name": "distil",
        "method": "kd",
        "student": {"name": "convnet", "arguments": {"width": 4}},
        "teacher": {"name": "convnet", "arguments": {"width": 8}, "seed": 3},
        "cache": {"folder": str(folder / "cache")},
        "train": TRAIN,
        **more,
    }


def recipe(folder, *stages, **data):
    """A recipe's file."""
    path = folder / "recipe.yaml"
    tree = {"data": {"name": "digits", "limit": 100, **data}, "stages": list(stages) or [distil(folder)]}
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def weights(folder):
    return {name: tensor.tolist() for name, tensor in load_file(folder / "student" / "model.safetensors").items()}


def figures(folder):
    """All that was measured, but times."""
    found = json.loads((folder / "results.json").read_text())["distil"]
    return {name: value for name, value in found.items() if name not in ("seconds", "phases", "latency")}


@pytest.mark.parametrize("augment", [[], ["crop"]])
def test_a_cached_run_ends_with_the_bits_and_figures_of_a_live_one(tmp_path, capsys, augment):
    path = recipe(tmp_path, augment=augment)
    assert main(["run", path, "--out", str(tmp_path / "cached"), "--quiet"]) == 2
    said = capsys.readouterr().err
    assert "distil.cache: there is no cache" in said
    assert "limbeck cache RECIPE, or the run's folder, --stage distil" in said
    assert not (tmp_path / "cached").exists()
    assert main(["cache", path, "--quiet"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "cache")
    assert main(["run", path, "--out", str(tmp_path / "cached"), "--quiet"]) == 0
    live = ["--distil.cache", "null"]
    assert main(["run", path, "--out", str(tmp_path / "live"), "--quiet", *live]) == 0
    assert weights(tmp_path / "cached") == weights(tmp_path / "live")
    assert figures(tmp_path / "cached") == figures(tmp_path / "live")
    assert "agreement" in figures(tmp_path / "cached")


def test_evaluation_of_a_cached_run_asks_the_teacher_itself(tmp_path):
    path = recipe(tmp_path)
    limbeck.cache(path, quiet=True)
    run = limbeck.run(path, tmp_path / "run", quiet=True)
    shutil.rmtree(tmp_path / "cache")
    measured = limbeck.evaluate(run)
    assert measured["agreement"] == figures(tmp_path / "run")["agreement"]


def test_the_teacher_need_not_be_built(tmp_path):
    path = recipe(tmp_path)
    limbeck.cache(path, quiet=True)
    other = {"distil.teacher": "mlp"}
    with pytest.raises(ForeignCacheError, match="another teacher"):
        limbeck.run(path, tmp_path / "one", overrides=other, quiet=True)
    believed = limbeck.run(path, tmp_path / "two", overrides={**other, "distil.cache.check_teacher": False}, quiet=True)
    assert "agreement" not in believed.results()["distil"]
    plain = limbeck.run(path, tmp_path / "three", quiet=True)
    assert weights(believed.folder) == weights(plain.folder)


def test_a_teacher_that_is_the_result_of_a_stage(tmp_path, capsys):
    teach = {"name": "teach", "method": "supervised", "student": "convnet", "train": TRAIN}
    path = recipe(tmp_path, teach, distil(tmp_path, teacher="stage:teach"))
    run = tmp_path / "run"
    with pytest.raises(UsageError, match="works with stage 'teach', which is not finished"):
        limbeck.cache(path)
    assert main(["run", path, "--out", str(run), "--quiet"]) == 2
    assert "limbeck cache FOLDER (the run's) --stage distil" in capsys.readouterr().err
    assert main(["cache", str(run), "--quiet"]) == 0
    assert main(["run", str(run), "--resume", "--quiet"]) == 0
    live = tmp_path / "live"
    assert main(["run", path, "--out", str(live), "--quiet", "--distil.cache", "null"]) == 0
    assert weights(run) == weights(live)
    assert figures(run) == figures(live)


def test_features(tmp_path):
    options = {"student_layers": ["stages.1"], "teacher_layers": ["stages.1"]}
    cache = {"folder": str(tmp_path / "cache"), "kind": "features", "layers": "stages.1"}
    path = recipe(tmp_path, distil(tmp_path, method="fitnet", options=options, cache=cache))
    limbeck.cache(path, quiet=True)
    limbeck.run(path, tmp_path / "cached", quiet=True)
    limbeck.run(path, tmp_path / "live", overrides={"distil.cache": None}, quiet=True)
    assert weights(tmp_path / "cached") == weights(tmp_path / "live")


def test_progress_is_shown_and_watched(tmp_path, capsys):
    seen = []
    limbeck.cache(recipe(tmp_path), watch=lambda stage, rows, row: seen.append((stage, rows, row["step"])))
    assert seen[-1] == ("distil", 100, 100)
    assert "distil  100/100" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cache", "said"),
    [
        ({}, "distil.cache.folder: this key is required"),
        ({"folder": "x", "kind": "dens"}, "did you mean 'dense'"),
        ({"folder": "x", "kind": "features"}, "layers go with kind features"),
        ({"folder": "x", "layers": ["a"]}, "layers go with kind features"),
        ({"folder": "x", "k": 0}, "distil.cache.k"),
    ],
)
def test_a_wrong_cache_is_a_wrong_recipe(tmp_path, capsys, cache, said):
    assert main(["run", recipe(tmp_path, distil(tmp_path, cache=cache)), "--dry-run"]) == 2
    captured = capsys.readouterr()
    assert said in captured.err


def test_fewer_epochs_than_training_takes_are_refused(tmp_path):
    stage = distil(tmp_path, cache={"folder": str(tmp_path / "cache"), "epochs": 1})
    with pytest.raises(RecipeError, match=r"distil\.cache\.epochs: training takes 2 epochs"):
        limbeck.cache(recipe(tmp_path, stage, augment=["crop"]), quiet=True)
    limbeck.cache(recipe(tmp_path, stage), quiet=True)  # whose items always look the same


def test_a_recipe_without_a_cache(tmp_path):
    with pytest.raises(RecipeError, match=r"distil\.cache: there is no cache to fill"):
        limbeck.cache(recipe(tmp_path, distil(tmp_path, cache=None)))
    with pytest.raises(UsageError, match="there is no stage 'distill'"):
        limbeck.cache(recipe(tmp_path), "distill")


def test_half_a_cache_names_the_command_that_continues(tmp_path):
    path = recipe(tmp_path)
    limbeck.cache(path, quiet=True)
    (tmp_path / "cache" / "seal.json").unlink()
    with pytest.raises(MissingCacheError, match="not complete"):
        limbeck.run(path, tmp_path / "run", quiet=True)


def text_recipe(folder, url, **arguments):
    """A language model that learns from a served one."""
    text = folder / "text.txt"
    text.write_text("\n\n".join(f"{n} bottles of beer on the wall, {n} bottles of beer" for n in range(60)))
    settings = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "resid_pdrop": 0.0}
    arguments = {"model": "tiny", "k": 5, "retries": 3, "backoff": 0.01, "timeout": 5, **arguments}
    stage = {
        "name": "distil",
        "method": "kl",
        "student": {"name": "config:gpt2", "arguments": settings},
        "teacher": {"name": f"served:{url}", "arguments": arguments},
        "train": {"steps": 6, "batch_size": 4, "checkpoint_every": 2, "log_every": 1},
    }
    data = {"name": f"text:{text}", "text": {"tokenizer": "bpe:280", "length": 16}, "limit": 24}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"data": data, "stages": [stage]}))
    return str(path)


def test_a_run_with_a_server_that_fails_stops_with_a_checkpoint_and_goes_on_later(tmp_path, capsys):
    model = language.llama(vocab_size=280)
    undisturbed, failing = tmp_path / "undisturbed", tmp_path / "failing"
    with serving(model, ["500", "wrong k", "NaN"], tmp_path / "log") as url:
        path = text_recipe(tmp_path, url, concurrency=1)
        assert main(["run", path, "--out", str(undisturbed), "--quiet"]) == 0  # three stumbles change nothing
    asked = 4 * 3
    with serving(model, ["right"] * asked + ["always truncated JSON"], tmp_path / "log") as url:
        path = text_recipe(tmp_path, url, concurrency=1)
        assert main(["run", path, "--out", str(failing), "--quiet"]) == 1
        said = capsys.readouterr().err
        assert "was asked 4 times and gave no usable answer: the answer is no JSON" in said
        assert "--resume" in said
    steps = sorted(path.name for path in (failing / "checkpoints" / "distil").glob("step-*"))
    assert steps == ["step-000000002"]
    port = int(url.split(":")[2].partition("/")[0])
    with serving(model, [], tmp_path / "log", port=port):
        assert main(["run", str(failing), "--resume", "--quiet"]) == 0
    assert weights(failing) == weights(undisturbed)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"k": 0}, "distil.teacher.arguments.k"),
        ({"modl": "x"}, "there is no such key"),
        ({"shape": "openai"}, "distil.teacher.arguments.shape"),
    ],
)
def test_a_wrong_argument_of_a_served_teacher_is_a_wrong_recipe(tmp_path, capsys, changes, said):
    path = text_recipe(tmp_path, "http://127.0.0.1:9/v1", **changes)
    assert main(["run", path, "--dry-run"]) == 2
    assert said in capsys.readouterr().err


def test_a_served_model_is_no_student_and_has_an_address(tmp_path, capsys):
    path = text_recipe(tmp_path, "http://127.0.0.1:9/v1")
    assert main(["run", path, "--dry-run", "--distil.student.name", "served:http://127.0.0.1:9/v1"]) == 2
    assert "can only be a teacher" in capsys.readouterr().err
    assert main(["run", path, "--dry-run", "--distil.teacher.name", "served:nowhere"]) == 2
    assert "holds no address" in capsys.readouterr().err

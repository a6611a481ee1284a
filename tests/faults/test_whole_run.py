"""A recipe run to its end leaves a student that the stock library loads, in a process where limbeck does not exist."""

import subprocess
import sys

import torch
from safetensors.torch import load_file, save_file

import limbeck

LOAD = """
import sys

class NoLimbeck:
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "limbeck":
            raise ImportError("limbeck is not here")

sys.meta_path.insert(0, NoLimbeck())
student, example, output = sys.argv[1:]
import timm
from safetensors.torch import load_file, save_file
model = timm.create_model(f"local-dir:{student}", pretrained=True).eval()
save_file({"logits": model(load_file(example)["image"]).detach()}, output)
assert "limbeck" not in sys.modules
"""


def test_a_timm_student_loads_without_limbeck(folder, tally):
    recipe = {
        "data": {"name": "digits", "limit": 64, "image_size": 32},
        "stages": [
            {
                "name": "teach",
                "method": "supervised",
                "student": {"name": "convnet", "arguments": {"width": 4, "depth": 2}},
                "train": {"steps": 2, "batch_size": 8},
            },
            {
                "name": "distil",
                "method": "kd",
                "student": "timm:test_vit",
                "teacher": "stage:teach",
                "train": {"steps": 3, "batch_size": 8},
            },
        ],
    }
    finished = limbeck.run(recipe, folder / "run", quiet=True)
    image = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    save_file({"image": image}, folder / "example.safetensors")
    paths = [str(finished.student), str(folder / "example.safetensors"), str(folder / "output.safetensors")]
    with tally("students loaded without limbeck"):
        done = subprocess.run([sys.executable, "-I", "-c", LOAD, *paths], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        theirs = load_file(folder / "output.safetensors")["logits"]
        with torch.no_grad():
            torch.testing.assert_close(theirs, limbeck.load(finished)(image), rtol=0, atol=0)

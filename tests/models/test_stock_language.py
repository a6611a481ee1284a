"""Language models, tokenizers and adapters load with stock transformers and peft where limbeck is not there."""

import json
import subprocess
import sys

import torch
from safetensors.torch import load_file, save_file

from limbeck.core.call import call, logits_of
from limbeck.models.export import export_model
from limbeck.models.saved import save_model
from limbeck.models.tokenizers import set_tokenizer
from tests.models.test_adapters import disturbed
from tests.models.texts import model, text, tokenizer

PROGRAM = """
import sys, json
sys.modules["limbeck"] = None  # any import of it fails
import torch, transformers
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
batch, found, words = load_file("batch.safetensors"), {}, {}
for name, kind in json.load(open("kinds.json")).items():
    if kind == "peft":
        base = transformers.AutoModelForCausalLM.from_pretrained(f"{name}/base")
        model = PeftModel.from_pretrained(base, name)
    else:
        model = getattr(transformers, kind).from_pretrained(name)
    with torch.no_grad():
        found[name] = model.eval()(**batch).logits.contiguous()
    if kind != "AutoModelForMaskedLM":
        written = model.generate(batch["input_ids"][:1], max_new_tokens=3, do_sample=False)
        assert written.shape[0] == 1
    tokens = transformers.AutoTokenizer.from_pretrained(name)
    words[name] = [tokens("the cat")["input_ids"], tokens.pad_token_id, tokens.eos_token_id,
                   tokens.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)]
save_file(found, "found.safetensors")
json.dump(words, open("words.json", "w"))
"""


def test_stock_libraries_load_what_was_saved(tmp_path):
    kinds = {
        "llama": ("AutoModelForCausalLM", model("llama")),
        "gpt2": ("AutoModelForCausalLM", model("gpt2")),
        "gemma2": ("AutoModelForCausalLM", model("gemma2")),
        "bert": ("AutoModelForMaskedLM", model("bert")),
        "lora": ("peft", disturbed(model("llama", adapter={"rank": 2}))),
        "merged": ("AutoModelForCausalLM", disturbed(model("gpt2", adapter={"rank": 2}))),
    }
    used = tokenizer()
    for name, (_, one) in kinds.items():
        set_tokenizer(one, used)
        if name == "merged":
            export_model(one, tmp_path / name, "transformers", merge=True)
        else:
            save_model(one, tmp_path / name)
    batch = text().fetch(torch.arange(4))
    save_file({key: batch[key] for key in ("input_ids", "attention_mask")}, tmp_path / "batch.safetensors")
    (tmp_path / "kinds.json").write_text(json.dumps({name: kind for name, (kind, _) in kinds.items()}))
    subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM], cwd=tmp_path, check=True)
    found, words = load_file(tmp_path / "found.safetensors"), json.loads((tmp_path / "words.json").read_text())
    for name, (_, one) in kinds.items():
        with torch.no_grad():
            torch.testing.assert_close(found[name], logits_of(call(one.eval(), batch)), rtol=1e-4, atol=1e-4)
        assert words[name] == [used("the cat")["input_ids"], 0, 2, "<|bos|>user\na<|eos|>\n"]

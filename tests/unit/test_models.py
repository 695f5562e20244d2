"""Models of several families: their parts are found by structure, and a folder that is no whole model is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rlsae.artifacts import Manifest
from rlsae.config import LocalModel
from rlsae.errors import RlsaeError
from rlsae.models import (
    blocks,
    build_model,
    check_tokenizer,
    component,
    computed_once,
    context_limit,
    load,
    module_path,
    output_tensor,
    replace_output,
    save,
    width,
)
from rlsae.pretrain import train_tokenizer

HOOKS = ["mlp", "attention", "block"]
PATHS = {
    "gpt_neox": ("gpt_neox.layers.1", "mlp", "attention"),
    "gpt_neo": ("transformer.h.1", "mlp", "attn"),
    "gpt2": ("transformer.h.1", "mlp", "attn"),
    "llama": ("model.layers.1", "mlp", "self_attn"),
    "gemma": ("model.layers.1", "mlp", "self_attn"),
    "qwen2": ("model.layers.1", "mlp", "self_attn"),
}
IDS = torch.tensor([[3, 70, 9, 11, 41, 200]])


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def edit_weights(folder, edit):
    path = folder / "model.safetensors"
    save_file(edit(load_file(path)), path, metadata={"format": "pt"})


@pytest.fixture
def folder(random_model, tokenizer, tmp_path):
    """A transformers folder of a GPT-NeoX."""
    save(random_model("gpt_neox"), tokenizer, tmp_path / "model")
    return tmp_path / "model"


# --- parts found by structure ------------------------------------------------------------------------------------


def test_the_blocks_are_those_that_the_hidden_states_pass_through(model):
    passed = []
    handles = [block.register_forward_hook(lambda module, *_: passed.append(module)) for block in blocks(model)]
    logits(model)
    for handle in handles:
        handle.remove()
    assert passed == list(blocks(model))
    assert len(passed) == model.config.num_hidden_layers == 2


def test_the_parts_of_a_block_have_the_names_that_their_family_gives_them(model):
    block, mlp, attention = PATHS[model.config.model_type]
    assert [module_path(model, 1, hook) for hook in HOOKS] == [f"{block}.{mlp}", f"{block}.{attention}", block]


@pytest.mark.parametrize("hook", HOOKS)
def test_the_path_of_a_part_leads_to_it(model, hook):
    for layer, block in enumerate(blocks(model)):
        assert model.get_submodule(module_path(model, layer, hook)) is component(block, hook)


def test_the_parts_of_a_block_are_three_different_modules(model):
    block = blocks(model)[0]
    assert len({id(component(block, hook)) for hook in HOOKS}) == 3


def test_the_width_is_that_of_the_hidden_states_and_the_limit_that_of_the_positions(model):
    with torch.no_grad():
        hidden = model(input_ids=IDS, output_hidden_states=True).hidden_states[-1]
    assert width(model) == hidden.shape[-1] == 32
    assert context_limit(model) == 64


def test_a_model_without_a_list_of_blocks_is_refused(random_model):
    changed = random_model("gpt2")
    changed.config.n_layer = 3
    with pytest.raises(RlsaeError, match="GPT2LMHeadModel: found no list of 3 transformer blocks"):
        blocks(changed)


def test_a_block_with_two_candidates_for_one_part_is_refused_with_its_children():
    block = nn.ModuleDict({"mlp": nn.Linear(2, 2), "adapter": nn.Linear(2, 2)})
    with pytest.raises(RlsaeError, match=r"expected one mlp, found 2; children: .*adapter"):
        component(block, "mlp")
    with pytest.raises(RlsaeError, match="expected one attention, found 0"):
        component(block, "attention")


# --- replaced outputs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("layer", [0, 1])
def test_a_replaced_output_changes_the_logits(model, layer, hook):
    with replace_output(model, layer, hook, lambda acts_BTD: acts_BTD.roll(1, -1)):
        changed = logits(model)
    assert (changed - logits(model)).abs().max() > 1e-3


@pytest.mark.parametrize("hook", HOOKS)
def test_an_output_replaced_by_itself_changes_no_bit(model, hook):
    with replace_output(model, 1, hook, lambda acts_BTD: acts_BTD.clone()):
        same = logits(model)
    assert torch.equal(same, logits(model))


@pytest.mark.parametrize("hook", HOOKS)
def test_an_output_is_replaced_only_within_the_context_also_when_it_fails(model, hook):
    before = logits(model)
    with pytest.raises(ZeroDivisionError), replace_output(model, 0, hook, lambda acts_BTD: acts_BTD / (1 // 0)):
        logits(model)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("layer", [0, 1])
def test_blocks_before_a_layer_are_computed_once_and_no_bit_changes(model, layer, hook):
    def shift(acts_BTD):
        return acts_BTD.roll(1, -1)

    with replace_output(model, layer, hook, shift):
        expected = logits(model)
    passes = []
    handle = next(blocks(model)[0].children()).register_forward_hook(lambda *_: passes.append(1))
    with computed_once(model, layer):
        clean = logits(model)
        with replace_output(model, layer, hook, shift):
            assert torch.equal(logits(model), expected)
    handle.remove()
    assert len(passes) == (1 if layer else 2)
    assert torch.equal(logits(model), clean)


@pytest.mark.parametrize("hook", HOOKS)
def test_what_is_replaced_is_what_the_part_puts_out(model, hook):
    outputs, seen = [], []
    handle = component(blocks(model)[1], hook).register_forward_hook(lambda m, a, output: outputs.append(output))
    with replace_output(model, 1, hook, lambda acts_BTD: seen.append(acts_BTD) or acts_BTD):
        logits(model)
    handle.remove()
    assert torch.equal(output_tensor(outputs[0]), seen[0])
    assert seen[0].shape == (1, IDS.shape[1], 32)


def test_the_last_block_put_out_as_zeros_leaves_logits_that_do_not_depend_on_the_text(model):
    with replace_output(model, 1, "block", torch.zeros_like):
        blank = logits(model)
    assert torch.allclose(blank[:, :1].expand_as(blank), blank, atol=1e-6)


# --- folders -----------------------------------------------------------------------------------------------------


def test_a_saved_model_is_loaded_bit_for_bit(model, tokenizer, tmp_path):
    save(model, tokenizer, tmp_path)
    loaded, its_tokenizer = load(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert its_tokenizer("the film is good")["input_ids"] == tokenizer("the film is good")["input_ids"]
    assert its_tokenizer.eos_token_id == tokenizer.eos_token_id


def test_a_loaded_model_is_in_float32_and_without_dropout(random_model, tokenizer, tmp_path):
    changed = random_model("gpt2")
    assert changed.config.resid_pdrop > 0
    save(changed.to(torch.bfloat16), tokenizer, tmp_path)
    loaded, _ = load(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.equal(logits(loaded), logits(loaded))


def test_no_pickle_is_written(folder):
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors", ".jinja"}


def test_weights_that_lack_a_part_are_refused_with_its_name(folder):
    edit_weights(folder, lambda weights: {n: t for n, t in weights.items() if "layers.1.mlp" not in n})
    with pytest.raises(RlsaeError, match=r"the weights lack .*layers\.1\.mlp\.dense_h_to_4h\.weight") as caught:
        load(folder)
    assert "this is not the model of its config.json" in str(caught.value)


def test_weights_that_the_model_shares_between_its_ends_are_not_missed(random_model, tokenizer, tmp_path):
    tied = random_model("gpt2")
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    save(tied, tokenizer, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert torch.equal(logits(load(tmp_path)[0]), logits(tied))


def test_weights_of_another_shape_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 20}))
    with pytest.raises(RlsaeError, match=str(folder)):
        load(folder)


def test_weights_that_were_cut_off_are_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RlsaeError, match=str(folder)):
        load(folder)


def test_a_folder_without_a_tokenizer_is_refused(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(RlsaeError, match="tokenizer"):
        load(folder)


@pytest.mark.parametrize("content", [None, "{", '{"model_type": "nothing"}', '{"model_type": "clip"}'])
def test_a_folder_that_is_no_causal_language_model_is_named(folder, content):
    (folder / "config.json").unlink()
    if content:
        (folder / "config.json").write_text(content)
    with pytest.raises(RlsaeError, match=str(folder)):
        load(folder)


def test_a_folder_without_weights_is_named(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(RlsaeError, match=f"transformers cannot load {folder}"):
        load(folder)


# --- tokenizers --------------------------------------------------------------------------------------------------


def test_a_tokenizer_with_more_tokens_than_the_model_embeds_is_refused_with_both_numbers(random_model, corpus):
    other = train_tokenizer(["the film is good and the plot is bad ."] * 9, vocabulary=275)
    other.add_tokens([f"<{number}>" for number in range(100)])
    with pytest.raises(RlsaeError, match=rf"the tokenizer has {len(other)} tokens, the model embeds 320"):
        check_tokenizer(random_model("gpt_neox"), other)


def test_a_model_may_embed_more_tokens_than_its_tokenizer_has(random_model, tokenizer):
    padded = random_model("gpt_neox")
    padded.resize_token_embeddings(len(tokenizer) + 8)
    check_tokenizer(padded, tokenizer)


def test_a_tokenizer_without_an_end_of_text_token_is_refused(random_model):
    other = train_tokenizer(["the film is good ."], vocabulary=260)
    other.eos_token = None
    with pytest.raises(RlsaeError, match=r"has no end-of-text token \(eos_token\)"):
        check_tokenizer(random_model("gpt_neox"), other)


# --- the stage ---------------------------------------------------------------------------------------------------


def test_a_local_folder_is_published_as_a_model(folder, tmp_path):
    entry = LocalModel(source="path", path=str(folder))
    out = tmp_path / "results" / "models" / "tiny"
    build_model(entry, entry.settings(), out, None, folder, None)
    manifest = Manifest.read(out)
    assert manifest.metrics["layers"] == 2
    assert manifest.metrics["channels"] == 32
    assert manifest.metrics["parameters"] == sum(p.numel() for p in load(folder)[0].parameters())
    assert list(manifest.inputs) == ["file:model"]
    assert torch.equal(logits(load(out / "model")[0]), logits(load(folder)[0]))


def test_a_model_whose_tokenizer_belongs_to_another_is_not_published(folder, tmp_path):
    other = train_tokenizer(["the film is good ."], vocabulary=260)
    other.add_tokens([f"<{number}>" for number in range(100)])
    other.save_pretrained(folder)
    out = tmp_path / "results" / "models" / "tiny"
    with pytest.raises(RlsaeError, match="they do not belong together"):
        build_model(LocalModel(source="path", path=str(folder)), {}, out, None, folder, None)
    assert not out.exists()


def test_a_copy_of_a_folder_elsewhere_is_the_same_model(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    manifests = []
    for source in (folder, tmp_path / "copy"):
        entry = LocalModel(source="path", path=str(source))
        out = tmp_path / source.name / "results" / "models" / "tiny"
        build_model(entry, entry.settings(), out, None, source, None)
        manifests.append((out / "manifest.json").read_bytes())
    assert manifests[0] == manifests[1]

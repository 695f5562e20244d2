"""The model families of the paper at toy size: the settings of their real configurations with small shapes, random weights, and
the tokenizer of the family's own class trained on a few texts."""

from __future__ import annotations

import json

from tokenizers import ByteLevelBPETokenizer, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

VOCABULARY = 400
PYTHIA = {"rotary_pct": 0.25, "use_parallel_residual": True, "hidden_act": "gelu", "tie_word_embeddings": False}
PYTHIA |= {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
GPT_NEO = {"activation_function": "gelu_new", "hidden_size": 32, "num_layers": 4, "num_heads": 4}
GPT_NEO |= {"attention_types": [[["global", "local"], 2]], "window_size": 16}
GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True}
GEMMA |= {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
FAMILIES = {"pythia": ("gpt_neox", PYTHIA), "gpt-neo": ("gpt_neo", GPT_NEO), "gemma": ("gemma", GEMMA)}


def write_family(name, texts, folder):
    """Write a transformers folder of one family: config, weights, tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, shape = FAMILIES[name]
    tokenizer = gemma_tokenizer(texts) if name == "gemma" else byte_level_tokenizer(name, texts)
    # As in the real models, more rows of the embedding than the tokenizer has tokens.
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    ends |= {"pad_token_id": tokenizer.pad_token_id} if name == "gemma" else {}
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY + 20, max_position_embeddings=96, **ends, **shape)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def byte_level_tokenizer(name, texts):
    from transformers import GPT2Tokenizer, GPTNeoXTokenizer

    own = {"pythia": (GPTNeoXTokenizer, ["<|endoftext|>", "<|padding|>"]), "gpt-neo": (GPT2Tokenizer, ["<|endoftext|>"])}
    kind, special = own[name]
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    model = json.loads(trained.to_str())["model"]
    return kind(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])


def gemma_tokenizer(texts):
    """BPE on whole words with a visible space and single bytes to fall back on, and a token before every text."""
    from transformers import GemmaTokenizer

    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.normalizer = normalizers.Replace(" ", "▁")
    bpe.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False))
    model = json.loads(bpe.to_str())["model"]
    tokenizer = GemmaTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
    begin = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single=f"{begin[0]} $A", special_tokens=[begin])
    return tokenizer

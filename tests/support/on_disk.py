"""Tiny adapters, base models, tokenizers and data in a folder, as users have them."""

import csv
import json

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch.nn import functional as F
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from laplace_lora import LogitsModel

WORDS = ["[PAD]", "[UNK]", "[EOS]", "good", "fine", "bad", "poor", "the", "film", "meal", "was"]
WORDS += ["user", "assistant", ":", "yes", "no"]
SIZES = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 24,
    "pad_token_id": 0,
}
HALF = ("layers", "attention_heads", "ffn_dim")  # of an encoder-decoder's sizes
CHAT = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} "
    "{% if m['role'] == 'assistant' %}[EOS]{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def tokenizer(chat=False):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="[UNK]",
        pad_token="[PAD]",
        eos_token="[EOS]",
        model_max_length=24,
        model_input_names=["input_ids", "attention_mask"],
    )
    if chat:
        made.chat_template = CHAT
    return made


def reviews(n, seed):
    """Rows with a text, a label, and an identity; one in eight is mislabelled."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(n):
        word, thing, noise = torch.randint(8, (3,), generator=generator).tolist()
        text = f"the {['film', 'meal'][thing % 2]} was {WORDS[3 + word % 4]}"
        label = int((word % 4 < 2) != (noise == 0))
        rows.append({"id": f"row-{i}", "text": text, "label": label})
    return rows


def write_json_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_json_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_table(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def _trained(model, losses, epochs=10):
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=2e-2, weight_decay=0.1)
    model.train()
    for _ in range(epochs):
        for loss in losses():
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def save_classifier(folder, outputs=2, **lora):
    """Save a base model without a head, and a classifier's adapter; return the latter's folder."""
    torch.manual_seed(0)
    words = tokenizer()
    base, adapter = folder / "base", folder / "adapter"
    BertForSequenceClassification(BertConfig(**SIZES)).bert.save_pretrained(base)
    words.save_pretrained(base)
    model = BertForSequenceClassification.from_pretrained(base, num_labels=outputs)
    config = {"r": 2, "target_modules": ["query", "value"], "task_type": TaskType.SEQ_CLS}
    model = get_peft_model(model, LoraConfig(**{**config, **lora}))
    rows = reviews(48, 0)

    def losses():
        for i in range(0, len(rows), 8):
            part = rows[i : i + 8]
            batch = words([r["text"] for r in part], padding=True, return_tensors="pt")
            labels = torch.tensor([r["label"] for r in part])
            yield model(**batch, labels=labels if outputs > 1 else labels.float()).loss

    _trained(model, losses).save_pretrained(adapter)
    return adapter


def save_decoder(folder, chat=False, answers=("bad", "good")):
    """Save a language model, and an adapter that answers with one of two words."""
    torch.manual_seed(0)
    words = tokenizer(chat)
    base, adapter = folder / "base", folder / "adapter"
    config = LlamaConfig(**SIZES, eos_token_id=2, bos_token_id=None)
    LlamaForCausalLM(config).save_pretrained(base)
    words.save_pretrained(base)
    model = LlamaForCausalLM.from_pretrained(base)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type=TaskType.CAUSAL_LM)
    model = get_peft_model(model, lora)
    logits_model = LogitsModel(model, target_ids=words.convert_tokens_to_ids(list(answers)))
    rows = reviews(48, 0)

    def asked(text):
        if not chat:
            return text
        turn = [{"role": "user", "content": text}]
        return words.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)

    def losses():
        for i in range(0, len(rows), 8):
            part = rows[i : i + 8]
            batch = words([asked(r["text"]) for r in part], padding=True, return_tensors="pt")
            yield F.cross_entropy(logits_model(batch), torch.tensor([r["label"] for r in part]))

    _trained(model, losses).save_pretrained(adapter)
    return adapter


def save_encoder_decoder(folder, writes="assistant $A [EOS]"):
    """Save BART and an untrained adapter, with a tokenizer that puts this around every text."""
    from tokenizers.processors import TemplateProcessing

    torch.manual_seed(0)
    words, special = tokenizer(), [("assistant", WORDS.index("assistant")), ("[EOS]", 2)]
    processor = TemplateProcessing(single=writes, special_tokens=special)
    words.backend_tokenizer.post_processor = processor
    base, adapter = folder / "base", folder / "adapter"
    sizes = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in HALF}
    ids = {"bos_token_id": None, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = BartConfig(
        vocab_size=len(WORDS), d_model=16, pad_token_id=0, init_std=0.2, **sizes, **ids
    )
    BartForConditionalGeneration(config).save_pretrained(base)
    words.save_pretrained(base)
    model = BartForConditionalGeneration.from_pretrained(base)
    lora = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    model = get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_2_SEQ_LM, **lora))
    model.save_pretrained(adapter)
    return adapter


def preferences(n, seed):
    """Rows of two texts on one thing, the chosen one of which is kind."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for thing, good, bad in torch.randint(2, (n, 3), generator=generator).tolist():
        text = f"the {['film', 'meal'][thing]} was "
        better, worse = ["good", "fine"][good], ["bad", "poor"][bad]
        rows.append({"chosen": text + better, "rejected": text + worse})
    return rows


def save_reward_model(folder, end=""):
    """Save a decoder and a reward model's adapter, trained on texts with this token behind them."""
    torch.manual_seed(0)
    words = tokenizer()
    base, adapter = folder / "base", folder / "adapter"
    config = LlamaConfig(**SIZES, eos_token_id=2, bos_token_id=None, initializer_range=0.4)
    LlamaForSequenceClassification(config).model.save_pretrained(base)
    words.save_pretrained(base)
    model = LlamaForSequenceClassification.from_pretrained(base, num_labels=1)
    lora = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": TaskType.SEQ_CLS}
    model = get_peft_model(model, LoraConfig(**lora))
    rows = preferences(48, 0)

    def rewards(part, name):
        texts = [row[name] + end for row in part]
        return model(**words(texts, padding=True, return_tensors="pt")).logits

    def losses():
        for i in range(0, len(rows), 8):
            part = rows[i : i + 8]
            yield -F.logsigmoid(rewards(part, "chosen") - rewards(part, "rejected")).mean()

    _trained(model, losses, epochs=5).save_pretrained(adapter)
    return adapter

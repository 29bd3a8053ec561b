"""Greedy decoding with prompt-lookup drafts, made only of `torch.ops.stateful_kv`.

For engine builders: bring your own scheduler, tokenizer and weights; the pages are plain tensors.
"""

import torch

from stateful_kv import ops
from stateful_kv.models.files.loading import load_model

PAGE_SIZE, NUM_PAGES, MAX_DRAFT = 64, 32, 4


# README.md shows what follows
def linear(x, layer, residual=None, norm=None, eps=0.0):
    w = layer.parts[0]  # panels of 16 columns, int8 or 4-bit: see stateful_kv.models.packing
    rest = (layer.bias, w.out_features, residual, norm, eps, layer.has_silu_mul)
    return ops.quantized_linear(x, w.weight, w.scales, w.minimums, *rest)


def forward(weights, config, pools, page_table, token_ids, start):
    """Writes K/V of tokens at positions start, start + 1, ... and returns their logits."""
    num, eps, heads = len(token_ids), config.rms_norm_eps, config.num_heads
    positions = torch.arange(start, start + num, dtype=torch.int32)
    slots = page_table[0, positions // PAGE_SIZE].long() * PAGE_SIZE + positions % PAGE_SIZE
    lens, offsets = torch.tensor([start + num]).int(), torch.tensor([0, num]).int()
    x = weights.embedding[token_ids]
    for layer, (k_pool, v_pool) in zip(weights.layers, pools, strict=True):
        qkv = linear(x, layer.qkv, norm=layer.attn_norm, eps=eps).view(num, -1, config.head_dim)
        q, (k, v) = qkv[:, :heads], qkv[:, heads:].chunk(2, dim=1)
        ops.rope_append_kv(q, k, v, positions, weights.cos_sin, slots, k_pool, v_pool)
        scale = config.head_dim**-0.5
        seen = ops.paged_attention(q, k_pool, v_pool, page_table, lens, offsets, scale)
        x = linear(seen.flatten(1), layer.o, residual=x)
        gated = linear(x, layer.gate_up, norm=layer.ffn_norm, eps=eps)
        x = linear(gated, layer.down, residual=x)
    return linear(x, weights.head, norm=weights.norm, eps=eps)


def generate(weights, config, pools, page_table, tokens, max_tokens):
    """Continues `tokens` greedily; also returns the number of forward passes."""
    end, cached, passes, draft = len(tokens) + max_tokens, 0, 0, tokens[:0]
    while len(tokens) < end:
        feed = torch.cat([tokens[cached:], draft])
        logits = forward(weights, config, pools, page_table, feed, cached)
        target, _ = ops.argmax(logits[len(feed) - len(draft) - 1 :])
        accepted, bonus = ops.verify_draft(draft, target, torch.tensor([0, len(draft)]).int())
        tokens = torch.cat([tokens, draft[: int(accepted)], bonus])
        cached, passes = len(tokens) - 1, passes + 1  # the bonus token has no K/V yet
        whole = torch.tensor([0, len(tokens)]).int()
        drafts, count = ops.ngram_lookup(tokens, whole, 2, 8, MAX_DRAFT)
        draft = drafts[0, : int(count)].long()
    return tokens[:end], passes


# README.md shows what is above


@torch.no_grad()
def main() -> None:
    loaded = load_model("smollm2")
    config = loaded.config
    shape = (config.num_layers, 2, NUM_PAGES, config.num_kv_heads, PAGE_SIZE, config.head_dim)
    pools = torch.zeros(shape, dtype=torch.float16)
    page_table = torch.randperm(NUM_PAGES, dtype=torch.int32)[None]  # any order will do
    code = "def area(width, height):\n    return width * height\n"
    prompt = f"Return this function unchanged:\n```python\n{code}```"
    ids = loaded.tokenizer.render_start([{"role": "user", "content": prompt}], None)
    start = torch.tensor(ids).long()
    weights = loaded.model.weights
    tokens, passes = generate(weights, config, pools, page_table, start, max_tokens=48)
    print(loaded.tokenizer.decode(tokens[len(start) :].tolist()))
    print(f"48 tokens in {passes} passes")


if __name__ == "__main__":
    main()

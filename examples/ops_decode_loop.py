"""Greedy decoding with prompt-lookup drafts, made only of `torch.ops.stateful_kv`.

For engine builders: bring your own scheduler, tokenizer and weights; the pages are plain tensors.
"""

import torch

from stateful_kv import ops
from stateful_kv.models.loading import load_model

PAGE_SIZE, NUM_PAGES, MAX_DRAFT = 64, 32, 4


def forward(weights, config, pools, page_table, token_ids, start):
    """Writes K/V of `token_ids` at positions start, start + 1, ... and returns all their logits."""
    num, heads, kv_heads = len(token_ids), config.num_heads, config.num_kv_heads
    positions = torch.arange(start, start + num, dtype=torch.int32)
    slots = page_table[0, positions // PAGE_SIZE].long() * PAGE_SIZE + positions % PAGE_SIZE
    seq_lens, offsets = (torch.tensor(v, dtype=torch.int32) for v in ([start + num], [0, num]))
    x = weights.embedding[token_ids]
    for layer, (k_pool, v_pool) in zip(weights.layers, pools, strict=True):
        qkv = layer.qkv(ops.rms_norm(x, layer.attn_norm, config.rms_norm_eps))
        q, k, v = qkv.view(num, -1, config.head_dim).split([heads, kv_heads, kv_heads], dim=1)
        ops.rope_append_kv(q, k, v, positions, weights.cos_sin, slots, k_pool, v_pool)
        attended = ops.paged_attention(
            q, k_pool, v_pool, page_table, seq_lens, offsets, config.head_dim**-0.5
        )
        x = layer.o(attended.flatten(1), residual=x)
        hidden = ops.rms_norm(x, layer.ffn_norm, config.rms_norm_eps)
        x = layer.down(ops.silu_mul(layer.gate_up(hidden)), residual=x)
    return weights.head(ops.rms_norm(x, weights.norm, config.rms_norm_eps))


@torch.no_grad()
def generate(loaded, tokens, max_tokens):
    """Returns `tokens` continued greedily, and the number of forward passes that took."""
    config, weights = loaded.config, loaded.model.weights
    shape = (2, NUM_PAGES, config.num_kv_heads, PAGE_SIZE, config.head_dim)
    pools = [torch.zeros(shape, dtype=torch.float16) for _ in range(config.num_layers)]
    page_table = torch.randperm(NUM_PAGES, dtype=torch.int32)[None]  # any order will do
    end, cached, passes = len(tokens) + max_tokens, 0, 0
    draft = tokens.new_empty(0)
    while len(tokens) < end:
        feed = torch.cat([tokens[cached:], draft])
        logits = forward(weights, config, pools, page_table, feed, cached)
        passes += 1
        target, _ = ops.argmax(logits[len(feed) - len(draft) - 1 :])
        accepted, bonus = ops.verify_draft(draft, target, torch.tensor([0, len(draft)]).int())
        tokens = torch.cat([tokens, draft[: int(accepted[0])], bonus])
        cached = len(tokens) - 1  # the bonus token has no K/V yet; rejected slots are overwritten
        whole = torch.tensor([0, len(tokens)]).int()
        drafts, count = ops.ngram_lookup(tokens, whole, 2, 8, MAX_DRAFT)
        draft = drafts[0, : int(count[0])].long()
    return tokens[:end], passes


if __name__ == "__main__":
    loaded = load_model("smollm2")
    prompt = "Repeat this line exactly: def add(first, second): return first + second"
    ids = loaded.tokenizer.render_start([{"role": "user", "content": prompt}], None)
    start = torch.tensor(ids).long()
    tokens, passes = generate(loaded, start, max_tokens=32)
    print(loaded.tokenizer.decode(tokens[len(start) :].tolist()))
    print(f"32 tokens in {passes} passes")

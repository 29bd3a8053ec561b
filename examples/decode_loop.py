"""Decoding with a prefix cache, forks and drafts: `stateful_kv.ops` and `stateful_kv.state` alone.

The model is tiny and random. docs/state.md explains the life of a sequence.
"""

import torch

from stateful_kv import ops, state

LAYERS, HEADS, KV_HEADS, DIM, VOCAB, PAGE_SIZE, NUM_PAGES = 2, 4, 2, 16, 64, 8, 64
pool = state.PagePool(NUM_PAGES, PAGE_SIZE)
table, tree = state.SequenceTable(pool), state.RadixTree(pool)
k_pools, v_pools = torch.zeros(2, LAYERS, NUM_PAGES, KV_HEADS, PAGE_SIZE, DIM)
torch.manual_seed(0)
embedding, head = torch.randn(2, VOCAB, HEADS * DIM)
qkv_weights = torch.randn(LAYERS, HEADS * DIM, (HEADS + 2 * KV_HEADS) * DIM) / 8
angles = torch.arange(512)[:, None] / 10000 ** (torch.arange(DIM // 2) * 2 / DIM)
cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1)


def forward(seq, tokens):
    """Writes K/V of new tokens behind those of the sequence; returns the logits of each."""
    ids, lens = torch.tensor([seq]), torch.tensor([len(tokens)], dtype=torch.int32)
    if (step := table.prepare_batch(ids, lens)) is None:
        tree.evict(table.pages_needed(seq, len(tokens)))
        step = table.prepare_batch(ids, lens)  # None again: the pool is too small for this text
    page_copies, page_table, seq_lens, offsets, positions, slots = step
    ops.copy_pages(page_copies, k_pools, v_pools)  # of a page that is shared with another sequence
    x = embedding[tokens]
    for qkv_weight, k, v in zip(qkv_weights, k_pools, v_pools, strict=True):
        qkv = (ops.rms_norm(x, torch.ones(x.shape[1]), 1e-6) @ qkv_weight).unflatten(1, (-1, DIM))
        q, new_k, new_v = qkv.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        ops.rope_append_kv(q, new_k, new_v, positions, cos_sin, slots, k, v)
        x = x + ops.paged_attention(q, k, v, page_table, seq_lens, offsets, DIM**-0.5).flatten(1)
    return x @ head.T


def generate(seq, tokens, num_new):
    """Continues tokens, of which the sequence has the first; also returns the number of passes."""
    index, num_passes, end = state.NgramIndex(), 0, len(tokens) + num_new
    index.append(tokens)
    while len(tokens) < end:
        draft = index.propose(min(4, end - len(tokens) - 1))[0].long()
        feed = torch.cat([tokens[table.length(seq) :], draft])
        target, _ = ops.argmax(forward(seq, feed)[-len(draft) - 1 :])
        accepted, bonus = ops.verify_draft(draft, target, torch.tensor([0, len(draft)]).int())
        table.commit(seq, len(feed) - len(draft) + int(accepted))  # refused tokens never were
        index.append(new := torch.cat([draft[: int(accepted)], bonus]))
        tokens, num_passes = torch.cat([tokens, new]), num_passes + 1
    tree.insert(0, tokens[: table.length(seq)], table.page_table(seq))
    return tokens, num_passes


if __name__ == "__main__":
    text, num_passes = generate(seq := table.create(), torch.randint(VOCAB, (29,)), 40)
    longer = torch.cat([text, torch.randint(VOCAB, (5,))])
    cached = tree.match(0, longer[:-1])  # the last token is fed, so that it has logits
    print(f"40 tokens in {num_passes} passes")
    for each in (table.fork(seq), table.adopt(cached.pages, cached.num_tokens), table.create()):
        print(table.length(each), "cached:", generate(each, longer, 9)[0].tolist()[-9:])

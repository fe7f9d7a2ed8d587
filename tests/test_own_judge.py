"""A judge of our own: an ar net that train.py saved measures the texts of others."""
import math
import os

import pytest
import torch

from data import get_tokenizer
from eval import generative_perplexity, load_judge
from model import DiT, ModelConfig, per_token_loss, write_checkpoint

TEXTS = ['A judge of our own.', 'Reads bytes, and scores all but the first.', 'x' * 60]


@pytest.fixture
def folder(tmp_path):
    """An out_dir with an untrained net on bytes; its mask has a logit, as all ids have."""
    torch.manual_seed(0)
    config = ModelConfig(
        block_size=48, vocab_size=258, mask_id=257, n_layer=2, n_head=2, n_embd=32, cond_dim=0,
        causal=True, objective='ar')
    net = DiT(config)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    weights = net.state_dict()
    write_checkpoint(
        dict(model=weights, ema=weights, optimizer=[], iter=1, tokens_seen=1, best_val_loss=1.0,
             model_config=vars(config), constants={}, tokenizer=get_tokenizer('bytes').meta()),
        str(tmp_path), ['ckpt.pt'])
    return str(tmp_path)


def test_its_perplexity_is_the_likelihood_of_the_ar_net(folder, capsys):
    judge = load_judge(folder)
    assert 'is it trained?' in capsys.readouterr().err
    nats, tokens = 0, 0
    for text in TEXTS:
        ids = torch.tensor([get_tokenizer('bytes').encode(text)[:48]])
        loss = per_token_loss(judge[0].net, ids, None, None)
        nats, tokens = nats + loss.sum().item(), tokens + ids.size(1) - 1
    found = generative_perplexity(TEXTS, judge, 'xlm', batch_size=2)
    assert found['tokens'] == tokens
    assert found['gen_ppl'] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    alone = generative_perplexity(TEXTS, folder, 'xlm', batch_size=1)
    assert alone['gen_ppl'] == pytest.approx(found['gen_ppl'], rel=1e-5)


def test_its_eos_is_one_token_of_a_text_that_keeps_it(folder):
    _, tok = load_judge(folder)
    options = dict(add_special_tokens=False, verbose=False)
    assert tok(['ab<|endoftext|>c', ''], **options)['input_ids'] == [[97, 98, 256, 99], []]
    assert generative_perplexity(['ab<|endoftext|>', 'c'], folder, 'mdlm')['tokens'] == 3


def test_a_net_that_looks_both_ways_is_no_judge(folder):
    checkpoint = torch.load(os.path.join(folder, 'ckpt.pt'), weights_only=True)
    checkpoint['model_config'] |= dict(causal=False, objective='mlm')
    write_checkpoint(checkpoint, folder, ['ckpt.pt'])
    with pytest.raises(ValueError, match='looks ahead'):
        load_judge(folder)

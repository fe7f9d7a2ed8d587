"""Weights in and out: training checkpoints of the releases, transformers, the hub."""

import dataclasses
import inspect
import json
import os
import pickle
import shutil
import subprocess
import sys
import types

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from model import DiT, ModelConfig, load_pretrained, save_pretrained, write_checkpoint

GOLDEN = os.path.join(os.path.dirname(__file__), 'golden')
SOURCES = {
    'mdlm': ('mdlm_hf/model.safetensors', {}),
    'mdlm_ar': ('mdlm_ar.safetensors', {}),
    'xlm': ('xlm/model.safetensors', {}),
    'smdm': ('smdm.safetensors', dict(n_head=4)),
    'smdm_ar': ('smdm_ar.safetensors', dict(n_head=4)),
}


def golden(family, **more):
    """(tensors by name, the net) of a published family."""
    file, overrides = SOURCES[family]
    path = os.path.join(GOLDEN, file)
    return load_file(path), load_pretrained(path, **overrides | more)


def same(net, other):
    own, theirs = net.state_dict(), other.state_dict()
    assert net.config == other.config and own.keys() == theirs.keys()
    return all(torch.equal(own[name], theirs[name]) for name in own)


class Foreign:
    """A class of the released code, which a checkpoint of it drags along."""


# --- training checkpoints


@pytest.mark.parametrize('compiled', ['', '_orig_mod.'])
def test_xlm_lightning_checkpoints_are_read_with_their_average(tmp_path, compiled):
    tensors, net = golden('xlm')
    state = {f'model.{compiled}{name}': tensor for name, tensor in tensors.items()}
    names = [f'model.{compiled}{name}' for name in tensors if 'rotary_emb' not in name]
    ema = dict(decay=0.9999, num_updates=3, shadow_params=[2 * state[name] for name in names])
    path = str(tmp_path / 'last.ckpt')
    rest = dict(callbacks=Foreign(), hyper_parameters=dict(tokenizer=Foreign()), global_step=3)
    # a metric of the LightningModule, which is not of the net
    torch.save(dict(state_dict=state | {'metric.mean': torch.ones(1)}, **rest), path)
    assert same(load_pretrained(path), net)
    torch.save(dict(state_dict=state, ema=ema, **rest), path)
    assert same(load_pretrained(path, ema=False), net)
    averaged = load_pretrained(path)
    for name, tensor in net.state_dict().items():
        assert torch.equal(averaged.state_dict()[name], 2 * tensor), name
    save_pretrained(averaged, tmp_path / 'out')  # an xlm folder
    ours = load_file(tmp_path / 'out' / 'model.safetensors')
    assert ours.keys() == tensors.keys()


@pytest.mark.parametrize('family', ['smdm', 'smdm_ar'])
def test_smdm_training_checkpoints_are_read(tmp_path, family):
    tensors, net = golden(family)
    path = str(tmp_path / 'iter-000100-ckpt.pth')
    optimizer = dict(state={0: dict(exp_avg=torch.ones(2))}, param_groups=[dict(lr=1e-4)])
    rest = dict(optimizer=optimizer, hparams=dict(out_dir=Foreign()), iter_num=100, step_count=10)
    torch.save(dict(model=tensors, **rest), path)
    assert same(load_pretrained(path, n_head=4), net)
    torch.save(tensors, path)  # a state_dict alone
    assert same(load_pretrained(path, n_head=4), net)


@pytest.mark.parametrize('family', SOURCES)
@pytest.mark.parametrize('prefix', ['_orig_mod.', 'module.', 'module._orig_mod.'])
def test_names_of_wrapped_modules_are_unwrapped(tmp_path, family, prefix):
    tensors, net = golden(family)
    path = str(tmp_path / 'm.safetensors')
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, path)
    assert same(load_pretrained(path, **SOURCES[family][1]), net)
    first, _, rest = next(name for name in tensors if '.0.' in name).partition('.0.')
    inner = {name.replace(f'{first}.0.', f'{first}.0.{prefix}'): tensor
             for name, tensor in tensors.items()}
    assert inner.keys() != tensors.keys()  # a block compiled by itself
    save_file(inner, path)
    assert same(load_pretrained(path, **SOURCES[family][1]), net)


@pytest.mark.parametrize('file', ['a.pth', 'a.ckpt'])
def test_nothing_in_a_training_checkpoint_is_executed(tmp_path, file):
    class Attack:
        def __reduce__(self):
            return os.system, (f'touch {tmp_path}/pwned',)

    tensors, net = golden('smdm')
    path = str(tmp_path / file)
    torch.save(dict(model=tensors, hparams=Attack()), path)
    assert same(load_pretrained(path, n_head=4), net)
    torch.save(dict(model=Attack()), path)
    with pytest.raises(ValueError, match='checkpoint that can be read'):
        load_pretrained(path)
    torch.save(dict(model=tensors, hparams=Attack()), path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match='no whole zip archive') as error:
        load_pretrained(path)
    assert '\n' not in str(error.value)
    with open(path, 'wb') as f:
        pickle.dump(Attack(), f)
    with pytest.raises(ValueError, match='no whole zip archive'):
        load_pretrained(path)
    assert not (tmp_path / 'pwned').exists()


# --- transformers


LOAD = """
import sys, torch, transformers
logits = {}
for folder in sys.argv[2:]:
    transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    net, report = transformers.AutoModelForMaskedLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        out = net(**torch.load('inputs.pt'))
    logits[folder] = getattr(out, 'logits', out)  # a tensor where return_dict is false (MDLM)
    net.save_pretrained(folder + '-again')
torch.save(logits, sys.argv[1])
"""


@torch.no_grad()
def test_saved_folders_load_through_the_auto_classes_of_transformers(tmp_path, tiny_net):
    nets = {family: golden(family)[1] for family in SOURCES}
    # what no fixture has: what a layout cannot tell, and a net of no layout
    nets['conditioned'] = golden('mdlm', time_conditioning=True, objective='sedd')[1]
    nets['wide'] = tiny_net(vocab_size=40, mask_id=7, n_mlp=24)
    nets['native'] = tiny_net(vocab_size=40, mask_id=39, mlp='swiglu', norm='rmsnorm')
    mamba = dict(mixer='mamba', norm='rmsnorm', head_bias=False)
    nets['mamba'] = tiny_net(vocab_size=40, mask_id=39, **mamba)
    for name, net in nets.items():
        save_pretrained(net, tmp_path / name)
    x, sigma = torch.arange(24).view(2, 12), torch.tensor([0.1, 2.0])
    attended = torch.arange(12).repeat(2, 1) < torch.tensor([[12], [9]])
    inputs = dict(input_ids=x, timesteps=sigma, attention_mask=attended.long())
    torch.save(inputs, tmp_path / 'inputs.pt')
    settings = dict(
        HF_HUB_OFFLINE='1', HF_MODULES_CACHE=str(tmp_path / 'modules'), OMP_NUM_THREADS='1')
    done = subprocess.run(  # nothing of ours is importable there
        [sys.executable, '-c', LOAD, 'logits.pt', *nets], cwd=tmp_path, text=True,
        env=os.environ | settings, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    logits = torch.load(tmp_path / 'logits.pt')
    for name, net in nets.items():
        torch.testing.assert_close(
            logits[name], net(x, sigma, attended), atol=1e-5, rtol=1e-5, msg=name)
        again = load_pretrained(str(tmp_path / f'{name}-again'))  # as transformers writes it
        assert torch.equal(again(x, sigma), net(x, sigma)), name


def test_an_xlm_folder_has_the_config_of_the_release(tmp_path):
    net = golden('xlm')[1]
    save_pretrained(net, tmp_path)
    described = json.load(open(tmp_path / 'config.json'))
    del described['auto_map']
    assert described == dict(  # arguments of its RotaryTransformerMLMModel, which the hub's mixin
        num_embeddings=61, d_model=32, num_layers=2, nhead=4, padding_idx=57, mask_idx=59,
        dim_feedforward=128, dropout=0.0, activation='relu', layer_norm_eps=1e-5, max_length=1024,
        rotary_emb_dim=8, force_flash_attn=False, final_layer_without_normalization=False)
    # one that others wrote tells what the tensors cannot
    os.remove(tmp_path / 'model.safetensors')
    tensors = {name: tensor for name, tensor in golden('xlm')[0].items() if 'inv_freq' not in name}
    save_file(tensors, tmp_path / 'model.safetensors')
    described |= dict(nhead=2, mask_idx=3, dropout=0.1, max_length=77)
    (tmp_path / 'config.json').write_text(json.dumps(described))
    config = load_pretrained(str(tmp_path)).config
    assert (config.n_head, config.mask_id, config.block_size) == (2, 3, 77)
    assert config.dropout == config.attn_dropout == 0.1


def test_an_xlm_folder_with_our_names_in_its_config_is_still_read(tmp_path):
    net = golden('xlm', block_size=33, pad_id=None, dropout=0.1, objective='subs')[1]
    save_pretrained(net, tmp_path)
    (tmp_path / 'config.json').write_text(json.dumps(dataclasses.asdict(net.config)))
    assert load_pretrained(str(tmp_path)).config == net.config


# --- the hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in of huggingface_hub that keeps what is uploaded in a folder; its calls."""
    calls = []
    real = huggingface_hub.HfApi  # whose signatures must take what is given

    class HfApi:
        def create_repo(self, *args, **options):
            given = inspect.signature(real.create_repo).bind(self, *args, **options).arguments
            assert given['exist_ok']  # else a second upload fails
            calls.append((given['repo_id'], given['private']))

        def upload_folder(self, *args, **options):
            given = inspect.signature(real.upload_folder).bind(self, *args, **options).arguments
            assert given['repo_id'] == calls[-1][0]
            target = tmp_path / 'hub' / given['repo_id']
            shutil.copytree(given['folder_path'], target, dirs_exist_ok=True)

    monkeypatch.setitem(sys.modules, 'huggingface_hub', types.SimpleNamespace(HfApi=HfApi))
    return calls


@pytest.fixture
def trained(tmp_path):
    """An out_dir with a checkpoint of step 450, a tokenizer of its own, and metrics."""
    torch.manual_seed(0)
    config = ModelConfig(block_size=16, vocab_size=40, mask_id=39, n_layer=1, n_head=2, n_embd=16)
    net = DiT(config)
    average = {name: tensor + 1 for name, tensor in net.state_dict().items()}
    constants = dict(dataset='stdlib', packing='wrap', learning_rate=1e-3, eval_iters=20,
                     global_batch_size=64, ema=0.999, seed=0, schedule='loglinear')
    checkpoint = dict(
        model=net.state_dict(), ema=average, optimizer=[], iter=450, tokens_seen=1_234_567,
        best_val_loss=5.1, model_config=dataclasses.asdict(config), constants=constants,
        tokenizer=dict(name='bpe-38'))
    write_checkpoint(checkpoint, tmp_path / 'out', ['ckpt.pt'], tokenizer=b'{"its": "own"}')
    lines = [
        dict(iter=225, val_loss=5.1, val_bpb=2.1), dict(iter=440, loss=5.9, lr=1e-3),
        dict(iter=450, val_loss=5.6993, val_bpb=2.29), dict(iter=460, val_loss=5.5, val_bpb=2.2)]
    text = ''.join(json.dumps(line) + '\n' for line in lines)
    (tmp_path / 'out' / 'metrics.jsonl').write_text(text + '{"iter": 470, "val_')  # killed
    return net, average


def test_push_uploads_a_net_that_loads_and_a_card_of_its_training(here, hub, trained, tmp_path):
    net, average = trained
    for _ in range(2):
        here('model.py', '--push=you/small', f'--source={tmp_path}/out', '--private=True')
    assert hub == [('you/small', True)] * 2
    folder = tmp_path / 'hub' / 'you' / 'small'
    loaded = load_pretrained(str(folder))
    assert loaded.config == net.config
    assert all(torch.equal(loaded.state_dict()[name], average[name]) for name in average)
    assert (folder / 'tokenizer.json').read_bytes() == b'{"its": "own"}'
    assert set(os.listdir(folder)) == {
        'README.md', 'config.json', 'modeling_nanomdm.py', 'model.safetensors', 'nanomdm.py',
        'tokenizer.json'}
    card = (folder / 'README.md').read_text()
    rows = dict(line.strip('| ').split(' | ') for line in card.splitlines() if line[:3] == '| d'
                or line.startswith(('| steps', '| tokens', '| tokenizer', '| valid', '| weights')))
    assert rows == {
        'dataset': 'stdlib', 'tokenizer': 'bpe-38', 'steps': '450', 'tokens': '1,234,567',
        'weights': 'the average of decay 0.999',
        'validation at step 450':
            '5.6993 nats/token, 2.2900 bits/byte (at most 20 global batches of rows)'}
    assert "from_pretrained('you/small', trust_remote_code=True)" in card


def test_published_weights_are_pushed_without_facts_that_no_one_knows(here, hub, tmp_path):
    here('model.py', '--push=you/mdlm', f'--source={GOLDEN}/mdlm_hf')
    assert hub == [('you/mdlm', False)]
    folder = tmp_path / 'hub' / 'you' / 'mdlm'
    assert same(load_pretrained(str(folder)), load_pretrained(f'{GOLDEN}/mdlm_hf'))
    card = (folder / 'README.md').read_text()
    assert 'steps' not in card and 'validation' not in card and '| objective | subs |' in card


def test_a_push_that_cannot_be_is_one_line(refused, hub, tmp_path):
    def unauthorized(self, *args, **kwargs):
        raise RuntimeError('401 Unauthorized\n\nlong words of the client')

    message = refused('model.py', f'--source={GOLDEN}/mdlm_hf')
    assert message == 'error: push=None: give the name of a repository of yours, --push=you/name\n'
    assert 'push=' in refused('model.py', f'--source={GOLDEN}/mdlm_hf', '--push=small')
    assert 'no checkpoint at' in refused('model.py', '--source=nowhere', '--push=you/small')
    sys.modules['huggingface_hub'].HfApi.create_repo = unauthorized
    message = refused('model.py', f'--source={GOLDEN}/mdlm_hf', '--push=you/small')
    assert message.count('\n') == 1 and '(RuntimeError: 401 Unauthorized)' in message
    assert "a token that may write, by 'hf auth login'" in message


def test_model_py_lists_its_constants(here, capsys):
    with pytest.raises(SystemExit):
        here('model.py', '--help')
    assert '--push=None' in (shown := capsys.readouterr().out) and "--source='out'" in shown

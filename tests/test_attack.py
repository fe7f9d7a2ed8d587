"""What a hostile tester found: files that would run code, and nets that came back as others."""

import dataclasses
import json
import os
import types
import zipfile

import pytest
import torch

import eval as measures
import model
import sample
from data import get_tokenizer, prepare
from model import DiT, ModelConfig, load_pretrained, read_checkpoint, save_pretrained
from test_train import SMALL, metrics

GOLDEN = os.path.join(os.path.dirname(__file__), 'golden')
LIGHTNING = os.path.join(GOLDEN, 'mdlm_lightning.ckpt')


def repacked(path, change=lambda name, data: data, extra=None, compression=zipfile.ZIP_STORED):
    """The released Lightning checkpoint, its records changed, added to or compressed."""
    with zipfile.ZipFile(LIGHTNING) as source, zipfile.ZipFile(path, 'w', compression) as target:
        for record in source.infolist():
            target.writestr(record.filename, change(record.filename, source.read(record)))
        root = source.namelist()[0].partition('/')[0]
        for name, data in (extra or {}).items():
            target.writestr(f'{root}/{name}', data)
    return str(path)


def test_a_torchscript_archive_is_refused_before_torch_sees_it(tmp_path, monkeypatch):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / 'a.ckpt')
    loaded = []
    monkeypatch.setattr(torch.jit, 'load', lambda *args, **kwargs: loaded.append(args))
    monkeypatch.setattr(torch, 'load', lambda *args, **kwargs: loaded.append(args))
    with pytest.raises(ValueError, match='torch.save does not write'):
        load_pretrained(str(tmp_path / 'a.ckpt'))
    os.rename(tmp_path / 'a.ckpt', tmp_path / 'ckpt.pt')
    with pytest.raises(ValueError, match='torch.save does not write'):
        read_checkpoint(str(tmp_path / 'ckpt.pt'))
    path = repacked(tmp_path / 'b.ckpt', extra={'constants.pkl': b'\x80\x02).'})
    with pytest.raises(ValueError, match='torch.save does not write'):
        load_pretrained(path)
    assert not loaded


def test_a_compressed_checkpoint_is_refused(tmp_path):
    whole = repacked(tmp_path / 'whole.ckpt')
    assert load_pretrained(whole).config == load_pretrained(LIGHTNING).config
    path = repacked(tmp_path / 'a.ckpt', compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match='compressed'):
        load_pretrained(path)


def test_a_flipped_bit_in_a_lightning_checkpoint_is_noticed(tmp_path):
    with zipfile.ZipFile(LIGHTNING) as archive:
        largest = max(archive.infolist(), key=lambda record: record.file_size)
    data = bytearray(open(LIGHTNING, 'rb').read())
    data[largest.header_offset + largest.file_size // 2] ^= 1
    (tmp_path / 'a.ckpt').write_bytes(data)
    with pytest.raises(ValueError, match='is not a Lightning checkpoint that can be read'):
        load_pretrained(str(tmp_path / 'a.ckpt'))


BASES = dict(
    mdlm=dict(),
    mdlm_ar=dict(causal=True, objective='ar', cond_dim=0),
    xlm=dict(
        cond_dim=0, mlp='relu', norm_bias=True, head_bias=False, objective='mlm', init='xlm',
        mask_id=38, pad_id=36,
    ),
    smdm=dict(
        cond_dim=0, norm='rmsnorm', mlp='swiglu', mlp_bias=False, head_bias=False,
        head_mask=False, rotary_bf16=True, init='smdm',
    ),
    smdm_ar=dict(
        cond_dim=0, norm='rmsnorm', mlp='swiglu', mlp_bias=False, head_bias=False, causal=True,
        objective='ar', mask_id=None, rotary_bf16=True, init='smdm',
    ),
)  # fmt: skip
CHANGES = [
    dict(),
    dict(block_size=7),
    dict(n_head=1),
    dict(n_mlp=24),
    dict(dropout=0.1, attn_dropout=0.2),
    dict(mask_id=4),
    dict(pad_id=5),
    dict(pad_id=None),
    dict(objective='sedd'),
    dict(objective='d3pm'),
    dict(objective='mlm'),
    dict(objective='subs'),
    dict(time_conditioning=True),
    dict(rotary_bf16=True),
    dict(rotary_bf16=False),
    dict(init='mdlm'),
    dict(init='xlm'),
]


@pytest.mark.parametrize('base', BASES)
@pytest.mark.parametrize('change', CHANGES, ids=str)
def test_every_field_of_a_net_comes_back(tmp_path, base, change):
    shape = dict(block_size=16, vocab_size=40, mask_id=39, n_layer=2, n_head=2, n_embd=16)
    try:
        config = ModelConfig(**shape | dict(cond_dim=8) | BASES[base] | change)
    except ValueError:
        pytest.skip('a setting that this family does not allow')
    net = DiT(config).eval()
    save_pretrained(net, tmp_path)
    again = load_pretrained(str(tmp_path))
    assert dataclasses.asdict(again.config) == dataclasses.asdict(config)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


def test_what_a_published_net_is_needs_no_words_of_ours(tmp_path):
    save_pretrained(load_pretrained(os.path.join(GOLDEN, 'mdlm_hf')), tmp_path)
    with open(tmp_path / 'config.json') as f:
        described = json.load(f)
    assert 'nanomdm' not in described
    for broken, message in (([1], "no dict 'nanomdm'"), (dict(a=1), "'a' is not a field")):
        (tmp_path / 'config.json').write_text(json.dumps(described | dict(nanomdm=broken)))
        with pytest.raises(ValueError, match=message):
            load_pretrained(str(tmp_path))


# --- measures that say one thing whatever the batch


def test_a_validation_is_computed_once(mine, here, monkeypatch):
    counted = []
    of_rows = model.likelihood_of
    monkeypatch.setattr(model, 'likelihood_of', lambda *args: counted.append(1) or of_rows(*args))
    here('train.py', *SMALL, '--max_iters=4', '--eval_interval=2')
    assert len(metrics()[1]) == len(counted) == 2


def test_answers_padded_to_their_batch_are_measured_whatever_the_batch(
    tmp_path, monkeypatch, here
):
    """Each row as if it were alone, in training's validation too."""
    monkeypatch.chdir(tmp_path)
    with open('p.jsonl', 'w') as f:
        for i in range(40):
            f.write(json.dumps(dict(prompt='ask', answer='x' * (1 + i * i % 9))) + '\n')
    prepare('pairs:p.jsonl', 'bytes', 'mine')
    done = here('train.py', *SMALL, '--packing=pair', '--pad_to=batch', '--val_split=train',
                '--max_iters=2', '--eval_iters=0')
    assert done['found']['tokens'] == done['found']['document_tokens']
    results = []
    for batch_size in (1, 7, 40):
        done = here('eval.py', '--device=cpu', f'--batch_size={batch_size}')
        results.append(done['result'])
    for result in results:
        assert result['nats_per_token'] == pytest.approx(results[0]['nats_per_token'], rel=1e-5)
        assert result['tokens'] == result['document_tokens']


@pytest.fixture
def writer(tiny_net):
    """A net over bytes, and its tokenizer."""
    net = tiny_net(vocab_size=258, mask_id=257, block_size=32)
    net.tokenizer = dict(name='bytes')
    return net, get_tokenizer('bytes')


def test_an_answer_depends_on_its_number_not_on_those_that_are_too_long(writer):
    options = dict(length=24, seed=3, steps=4, sampler='ancestral', batch_size=8)
    prompts = ['to be', 'x' * 40, 'or', 'x' * 40, 'not to be']
    for passes in (1, 2):
        together = measures.decode_prompts(*writer, prompts, passes, first_row=5, **options)
        assert together[1] == together[3] == ([], 'ERROR')
        for i, prompt in enumerate(prompts):
            alone = measures.decode_prompts(*writer, [prompt], passes, first_row=5 + i, **options)
            assert alone == together[i:i + 1]


def test_requests_that_generate_have_seeds_of_their_own_in_any_number_of_processes(
    writer, monkeypatch
):
    requests = [
        ('to be', dict(max_gen_toks=8 + i % 2, do_sample=True, temperature=0.5 + i // 3))
        for i in range(6)
    ]
    whole = measures.continue_until(*writer, list(enumerate(requests)), steps=4)
    assert len(set(whole)) == 6
    for rank in range(2):
        mine = list(enumerate(requests))[rank::2]
        assert measures.continue_until(*writer, mine, steps=4) == whole[rank::2]


def test_a_fine_tuned_net_keeps_how_its_family_is_prompted_and_measured(
    tiny_net, mine, here, tmp_path
):
    """SMDM's prompts begin with BOS; resuming and saving again keep that."""
    net = tiny_net(
        vocab_size=258, mask_id=257, cond_dim=0, norm='rmsnorm', mlp='swiglu', mlp_bias=False,
        head_bias=False, head_mask=False, rotary_bf16=True, init='smdm')
    save_pretrained(net, 'smdm')
    first = load_pretrained('smdm')
    assert first.constants['prompt_bos'] and first.constants['mc_eps'] == 0.0
    small = [*SMALL, '--max_iters=1', '--eval_iters=1', '--eval_interval=9']
    tuned = [*small, '--init_from=smdm', "--overrides={'n_head': 2}"]
    here('train.py', *tuned)
    here('train.py', *tuned, '--init_from=resume', '--max_iters=2')
    here('train.py', *small, '--init_from=out', '--out_dir=again')
    save_pretrained(load_pretrained('again'), 'saved')
    for source in ('out', 'again', 'saved'):
        constants = load_pretrained(source).constants
        kept = {key: constants.get(key) for key in ('prompt_bos', 'mc_eps', 'mc_draws')}
        assert kept == dict(prompt_bos=True, mc_eps=0.0, mc_draws=1024)
        assert constants['packing'] == 'wrap'  # what was trained with, not the family's


def test_a_run_of_epochs_counts_as_finished_for_scaling_laws(mine, here):
    done = here('train.py', *SMALL, '--epochs=0.05', '--eval_interval=100')
    assert done['max_iters'] == 6
    run = measures.read_run('out')
    assert run['D'] == 6 * 8 * 16
    here('train.py', *SMALL, '--epochs=0.1', '--eval_interval=6', '--out_dir=part')
    lines = open('part/metrics.jsonl').readlines()
    with open('part/metrics.jsonl', 'w') as f:
        f.writelines(line for line in lines if json.loads(line)['iter'] <= 6)
    with pytest.raises(ValueError, match='validated at step 6 of 12'):
        measures.read_run('part')


def test_a_result_that_cannot_be_written_is_shown_and_what_is_there_stays(tmp_path):
    with pytest.raises(OSError, match=r'what it lacks: \{"ppl": 7\}'):
        measures.record(str(tmp_path), metric='ppl', result=dict(ppl=7))
    with pytest.raises(OSError, match=r'what it lacks: \{"ppl": 7\}'):
        measures.record(str(tmp_path / 'gone' / 'r.jsonl'), metric='ppl', result=dict(ppl=7))


def test_a_samplers_options_are_its_own(tiny_net, refused, tmp_path):
    net = tiny_net(vocab_size=258, mask_id=257)
    save_pretrained(net, tmp_path / 'net')
    for option in ('seed', 'first_row', 'schedule', 'on_change', 'numbers'):
        error = refused(
            'sample.py', '--init_from=net', '--tokenizer=bytes', '--device=cpu', '--steps=2',
            '--num_samples=1', f"--sampler_options={{'{option}': 3}}")
        assert error.startswith(f'error: {option} does not go with sampler')


def test_only_a_tokenizer_of_the_net_goes_with_its_weights(tiny_net, tmp_path, monkeypatch):
    """--push would upload whatever tokenizer.json lies in the folder one is in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'tokenizer.json').write_text('of something else')
    net = tiny_net(vocab_size=258, mask_id=257)
    for tokenizer in (dict(name='bytes'), dict(name='bytes', folder='.')):
        net.tokenizer = tokenizer
        save_pretrained(net, 'saved')
        assert not os.path.exists('saved/tokenizer.json')
    net.tokenizer = dict(name='bpe-257', folder='.')
    save_pretrained(net, 'saved')
    assert os.path.exists('saved/tokenizer.json')


def test_answers_are_drawn_in_the_number_format_asked_for(
    tiny_net, here, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    save_pretrained(tiny_net(vocab_size=258, mask_id=257), 'net')
    with open('a.jsonl', 'w') as f:
        f.write(json.dumps(dict(prompt='to', answer='be')) + '\n')
    drawn = {}
    for dtype in ('float64', 'float32'):
        here('eval.py', '--metric=generation', '--input=a.jsonl', '--init_from=net', '--steps=4',
             '--tokenizer=bytes', '--device=cpu', f'--draw_dtype={dtype}', f'--samples_dir={dtype}')
        path, = (tmp_path / dtype / 'a').glob('*.jsonl')
        row = json.loads(path.read_text())
        drawn[dtype] = row['ids'], row['settings'].get('draw_dtype')
    assert drawn['float64'][0] != drawn['float32'][0]
    assert drawn['float64'][1] is None and drawn['float32'][1] == 'float32'
    assert {'top_p', 'top_k', 'draw_dtype'} <= set(measures.HARNESS_OPTIONS)


def test_saved_weights_are_as_private_as_other_new_files(tiny_net, tmp_path):
    for umask, mode in ((0o077, 0o600), (0o022, 0o644)):
        before = os.umask(umask)
        try:
            save_pretrained(tiny_net(), tmp_path / str(umask))
        finally:
            os.umask(before)
        for name in ('model.safetensors', 'config.json'):
            assert os.stat(tmp_path / str(umask) / name).st_mode & 0o777 == mode


def test_sampling_asks_for_memory_as_training_does():
    """Which knows control groups: in a container the machine's own is not what one may have."""
    assert sample.free_memory is model.free_memory


@pytest.mark.parametrize(
    'constants', (dict(schedule=[]), dict(schedule_parameters=5), dict(schedule_parameters=[1]))
)
def test_constants_of_strange_weights_are_refused_in_one_line(constants):
    with pytest.raises(ValueError, match='schedule'):
        model.schedule_of(constants)


def test_kept_samples_of_whole_batches_are_not_mixed_with_those_of_other_batches(
    tiny_net, tmp_path, monkeypatch
):
    """Greedy across rows: a row depends on those beside it."""
    net = tiny_net(vocab_size=258, mask_id=257)
    net.tokenizer = dict(name='bytes')
    drawn = []
    for across_rows in (True, False):
        for batch_size in (2, 3):
            c = types.SimpleNamespace(
                length=8, sampler='greedy', temperature=1.0, top_p=None, top_k=0, seed=0, steps=4,
                draw_dtype='float64', batch_size=batch_size, dtype='float32', num_samples=4,
                out_dir='out', samples_dir=str(tmp_path),
                sampler_options=dict(across_rows=across_rows))
            drawn.append(measures.draw(measures.Run(c, 'net', torch.device('cpu'), net))[2])
    assert drawn[0] != drawn[1] and drawn[2] == drawn[3]


def test_a_likelihood_under_a_schedule_that_does_not_mask_all_is_called_no_bound(
    mine, here, capsys
):
    """The bound has a term for what is left of the text at t = 1, which is infinite."""
    tuned = [*SMALL, '--max_iters=1', '--time_conditioning=True', '--eval_iters=1']
    for schedule, warned in (('geometric', True), ('linear', False)):
        here('train.py', *tuned, f'--schedule={schedule}', f'--out_dir={schedule}')
        capsys.readouterr()
        here('eval.py', f'--out_dir={schedule}', '--device=cpu', '--max_rows=4')
        assert ('leaves 36.8% of the tokens unmasked' in capsys.readouterr().err) == warned

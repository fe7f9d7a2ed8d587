"""What a new user meets first: memory before training, one validation number, an own objective."""

import math
import re

import pytest
import torch

import model
import sample
from conftest import ROOT, save_net
from data import TokenRows, prepare
from eval import nelbo
from model import (
    OBJECTIVES, DiT, ModelConfig, Objective, corrupt, free_memory, get_schedule, memory_needed,
    per_token_loss
)
from test_train import SMALL, metrics

SHAPE = dict(block_size=32, vocab_size=500, mask_id=499, n_layer=2, n_head=2, n_embd=64)


# --- memory


@pytest.mark.parametrize(
    'shape, dtype',
    [
        (dict(dropout=0.1), 'float32'),
        (dict(dropout=0.1), 'bfloat16'),
        (dict(norm='rmsnorm', mlp='swiglu', cond_dim=0), 'bfloat16'),
        (dict(objective='ar', causal=True, cond_dim=0), 'float32'),
    ],
)
def test_activations_are_predicted_to_the_byte_of_what_a_step_allocates(shape, dtype):
    """The oracle counts the tensors of a real step; none of them are fake."""
    config, rows = ModelConfig(**SHAPE | shape), 8
    predicted = memory_needed(config, rows, 32, 'cpu', dtype)
    share = 1 if config.causal else 1 / 2 + 1 / 16
    with model.LiveBytes() as live:
        net = DiT(config).train()
        P = net.num_params()
        x = torch.zeros(rows, 32, dtype=torch.int64)
        masked = torch.arange(round(rows * 32 * share))
        with model.autocast(torch.device('cpu'), dtype):
            per_token_loss(net, x, x, torch.ones(rows), masked=masked).mean().backward()
    assert predicted['weights'] == predicted['gradients'] == predicted['average'] == 4 * P
    assert 8 * P <= predicted['optimizer'] < 8 * P + 1000  # and the numbers of steps
    expected = live.peak + predicted['optimizer'] + predicted['average']
    found = predicted['total'] - predicted['heap']
    assert found == pytest.approx(expected, rel=0.02)


def test_memory_grows_with_rows_alone_and_is_shared_out():
    config = ModelConfig(**SHAPE)
    one, two = (memory_needed(config, rows, 32, accumulate=True) for rows in (8, 16))
    assert one['weights'] == two['weights']
    assert two['activations'] == pytest.approx(2 * one['activations'], rel=0.1)
    shared = memory_needed(config, 8, 32, accumulate=True, shards=2)
    assert shared['weights'] == one['weights'] / 2
    assert shared['activations'] == one['activations']


def test_free_memory_is_the_least_that_the_machine_and_its_groups_leave(tmp_path):
    def write(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    def free():
        return free_memory(torch.device('cpu'), str(tmp_path))

    write('proc/meminfo', 'MemTotal: 9000 kB\nMemAvailable:    5000 kB\n')
    assert free() == 5000 * 1024
    write('proc/self/cgroup', '4:memory:/job/step\n0::/\n')  # version 1
    write('sys/fs/cgroup/memory/memory.limit_in_bytes', '9223372036854771712')
    write('sys/fs/cgroup/memory/memory.usage_in_bytes', '77')
    write('sys/fs/cgroup/memory/memory.stat', 'inactive_file 7\ntotal_inactive_file 9\n')
    assert free() == 5000 * 1024
    write('sys/fs/cgroup/memory/job/memory.limit_in_bytes', '4000000')
    write('sys/fs/cgroup/memory/job/memory.usage_in_bytes', '1000000')
    write('sys/fs/cgroup/memory/job/memory.stat', 'cache 1\ninactive_file 50000\n')
    assert free() == 3_050_000
    write('proc/self/cgroup', '0::/slurm/job\n')  # version 2
    write('sys/fs/cgroup/slurm/job/memory.max', 'max\n')
    write('sys/fs/cgroup/slurm/job/memory.current', '1000\n')
    write('sys/fs/cgroup/slurm/job/memory.stat', 'inactive_file 0\n')
    assert free() == 5000 * 1024
    write('sys/fs/cgroup/slurm/memory.max', '3000\n')
    write('sys/fs/cgroup/slurm/memory.current', '1000\n')
    write('sys/fs/cgroup/slurm/memory.stat', 'inactive_file 100\n')
    assert free() == 2100


def test_a_net_that_does_not_fit_is_one_line_before_it_is_allocated(mine, refused, monkeypatch):
    """8 x 1,024 with 2 GB free, then with 0.1."""
    with open('long.txt', 'w') as f:
        f.write('\n\n'.join(f'{i} {"to be or not " * 300}' for i in range(40)))
    prepare('text:long.txt', 'bytes', 'long')
    made = []
    monkeypatch.setattr(model.DiT, 'to', lambda *args: made.append(args))
    large = [
        *SMALL, '--dataset=long', '--n_layer=2', '--n_head=12', '--n_embd=768',
        '--block_size=1024', '--batch_size=8', '--max_iters=1000'
    ]
    monkeypatch.setattr(model, 'free_memory', lambda device: 2e9)
    line = refused('train.py', *large)
    assert re.fullmatch(
        r'error: [\d.]+M parameters and 8 rows of 1024 need [\d.]+ GB \(weights 0.06, .*\), '
        r'2.00 GB are free on cpu: lower batch_size, [124] fits\n', line
    ), line
    monkeypatch.setattr(model, 'free_memory', lambda device: 1e8)
    assert 'lower n_layer, n_embd or block_size' in refused('train.py', *large)
    assert not made


def test_training_says_what_it_needs_before_step_one(mine, here, capsys):
    here('train.py', *SMALL, '--max_iters=1')
    said = capsys.readouterr().out
    line = re.search(r'0.01M parameters and 2 rows of 16 need 0.00 GB \(weights 0.00, .*', said)
    assert line and 'GB are free on cpu' in line[0] and line.start() < said.index('step 1:')
    assert re.search(r'step 1: .* left', said)


# --- one validation number


def test_trainings_validation_is_evals_on_its_rows_within_their_errors(mine, here, capsys):
    options = [*SMALL, '--max_iters=40', '--eval_interval=40', '--eval_iters=5', '--packing=wrap']
    here('train.py', *options)
    found = re.search(
        r'validation ([\d.]+) ± ([\d.]+) nats/token, ([\d.]+) ± ([\d.]+) bits/byte '
        r'\(first (\d+) of (\d+) rows, one time each\)', capsys.readouterr().out
    )
    value, error, bits, _, n, total = map(float, found.groups())
    assert n == min(40, total) and metrics()[1][40]['val_loss'] == pytest.approx(value, abs=1e-4)
    net = model.load_pretrained('out')
    rows = first_rows(n)
    same = nelbo(net, rows, num_mc=64, max_rows=int(n))
    errors = math.hypot(error, same['nats_per_token_se'])
    assert 0 < error < 0.5 and abs(value - same['nats_per_token']) < 4 * errors


def first_rows(n):
    """The first n validation rows, as training cuts them."""
    rows = TokenRows('data/mine', 'validation', 16, 'wrap')

    class First:
        counts = rows.counts

        def __len__(self):
            return int(n)

        def __getitem__(self, index):
            return rows[index]

    return First()


# --- an objective of one's own


@pytest.fixture
def own(monkeypatch):
    """A function that adds an objective with an option, gamma, to the table."""

    def focal(pos, *, gamma=0.0):
        nll = pos.net.nll(pos.h, pos.x0)
        return nll * (1 - torch.exp(-nll)) ** gamma

    def add(**fields):
        fields = dict(predicts='x0', sampler='ancestral') | fields
        monkeypatch.setitem(OBJECTIVES, 'focal', Objective(focal, **fields))

    return add


def test_an_option_of_an_objective_is_read_from_its_loss_alone(own, tiny_net):
    own()
    net, x0 = tiny_net(objective='focal'), torch.randint(10, (3, 16))
    xt = corrupt(x0, torch.full((3,), 0.5), 10, model.loglinear)
    losses = [per_token_loss(net, x0, xt, torch.ones(3), gamma=gamma) for gamma in (0.0, 2.0)]
    p = torch.exp(-losses[0])
    torch.testing.assert_close(losses[1], losses[0] * (1 - p) ** 2)
    with pytest.raises(ValueError, match='gamma=2.0 goes with objective focal'):
        per_token_loss(net, x0, xt, torch.ones(3), 'subs', gamma=2.0)
    per_token_loss(net, x0, xt, torch.ones(3), 'subs', gamma=0.0)
    with pytest.raises(ValueError, match="option 'delta' is not known: choose from .*gamma"):
        per_token_loss(net, x0, xt, torch.ones(3), delta=2.0)


def test_an_option_is_trained_with_by_a_constant_of_its_name(own, mine, here, tmp_path):
    own()
    train = open(f'{ROOT}/train.py').read()
    constant = "objective = 'subs'          #"
    assert constant in train
    (tmp_path / 'train.py').write_text(train.replace(constant, f'gamma = 0.0\n{constant}'))
    losses = []
    for gamma in (0.0, 2.0):
        here(tmp_path / 'train.py', *SMALL, '--objective=focal', f'--gamma={gamma}',
             '--max_iters=1', f'--out_dir={gamma}')
        losses.append(metrics(str(gamma))[0][1]['loss'])
    assert 0 < losses[1] < losses[0]


def test_an_objective_without_a_bound_is_measured_by_its_name(own, mine, here, capsys):
    own()
    here('train.py', *SMALL, '--objective=focal', '--eval_interval=10')
    said = capsys.readouterr().out
    assert "objective 'focal' has no bound in OBJECTIVES" in said.split('step 1:')[0]
    assert re.search(r'validation [\d.]+ ± [\d.]+ focal \(first', said)
    assert metrics()[1][10]['val_bpb'] is None
    here('eval.py', '--device=cpu')
    measured = capsys.readouterr().out
    assert measured.startswith('focal of out on mine/validation')
    assert not re.search('NELBO|perplexity|bits/byte|nats', measured)


def test_an_objective_that_nothing_samples_or_bounds_is_refused_before_training(own, mine, refused):
    arguments = [*SMALL, '--objective=focal', '--sample_at_end=True']
    own(predicts='velocity')
    assert "has no sampler: give it one in OBJECTIVES that is registered with " in refused(
        'train.py', *arguments
    )
    own(sampler=None)
    assert "@sampler_for('x0')" in refused('train.py', *arguments)
    own(bound='elbow')
    assert "its bound 'elbow' is not in OBJECTIVES" in refused('train.py', *arguments)


# --- d3pm


@pytest.mark.parametrize('name', ['loglinear', 'linear', 'cosine', 'cosinesqr', 'geometric'])
def test_d3pm_is_the_enumerated_kl_of_its_schedule(tiny_net, name):
    """KL(q(xs | xt, x0) || sum over x of q(xs | xt, x) p(x | xt)), by the matrices of q."""
    net, T, V, mask = tiny_net(objective='d3pm'), 8, 11, 10
    schedule = get_schedule(name)
    net = net.double()
    x0 = torch.arange(T)[:, None] % 10
    xt = torch.full((T, 1), mask)
    t = torch.arange(1, T + 1).double() / T
    found = per_token_loss(net, x0, xt, t, 'd3pm', schedule, T)[:, 0]

    def alpha(time):
        return float(1 - time if name == 'loglinear' else schedule.alpha(time))

    def transition(kept):  # rows: from, columns: to
        q = kept * torch.eye(V, dtype=torch.float64)
        q[:, mask] += 1 - kept
        return q

    for i in range(T):
        s = torch.tensor(i / T, dtype=torch.float64)
        a_s, a_t = alpha(s), alpha(t[i])
        to_s, s_to_t = transition(a_s), transition(a_t / a_s)
        joint = to_s * s_to_t[:, mask]  # (x, xs): q(xs | x) q(xt = m | xs)
        p = net(xt[i:i + 1], t[i:i + 1])[0, 0].softmax(dim=0)
        true = joint[x0[i, 0]] / joint[x0[i, 0]].sum()
        # the released parametrisation mixes x before it divides
        given = p @ joint / (p @ joint).sum()
        kl = torch.where(true > 0, true * (true / given).log(), 0).sum()
        assert found[i].item() == pytest.approx(T * kl.item(), rel=2e-5)


# --- what a new user's extensions and mistakes met


def test_a_schedule_may_be_given_by_alpha_alone():
    class Polynomial(model.Schedule):
        def alpha(self, t):
            return 1 - t ** 2

    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    torch.testing.assert_close(Polynomial().dsigma(t), 2 * t / (1 - t ** 2))


def test_an_option_of_an_objective_that_no_key_could_set_is_refused():
    def focal(p, power=2.0):
        return p.net.nll(p.h, p.x0)

    with pytest.raises(ValueError, match=r'focal: its option power must be keyword-only'):
        Objective(focal, 'x0').options  # noqa: B018 (the property refuses)


def test_a_samplers_option_is_not_named_like_a_constant(monkeypatch):
    def mine(b, num_steps, seed=0):
        pass

    monkeypatch.setitem(sample.SAMPLERS, 'mine', mine)
    with pytest.raises(ValueError, match="sampler 'mine': its option seed has the name of a con"):
        sample.flags()


def test_what_others_were_writing_is_left_where_a_run_goes_on(mine, here, tmp_path):
    here('train.py', *SMALL, '--max_iters=1')
    (tmp_path / 'out' / 's.jsonl.unfinished').write_text('{}\n')
    here('train.py', *SMALL, '--max_iters=2', '--init_from=resume')
    assert (tmp_path / 'out' / 's.jsonl.unfinished').exists()


def test_samples_do_not_replace_what_is_no_jsonl(tiny_net, refused, tmp_path):
    save_net(tiny_net(vocab_size=258, mask_id=257), tmp_path)
    (tmp_path / 'README.md').write_text('mine')
    assert 'must end in .jsonl' in refused('sample.py', '--out_dir=.', '--out=README.md')
    assert (tmp_path / 'README.md').read_text() == 'mine'

"""One's own text: sources that are broken or edited, tokenizers of nets, small.py, text8."""

import json
import os
import shutil

import numpy as np
import pytest

from conftest import ROOT, write, write_words
from data import TokenRows, find_or_prepare, get_tokenizer, permute, prepare, read_meta

TINY = (
    '--n_layer=1', '--n_head=2', '--n_embd=16', '--block_size=16', '--batch_size=4',
    '--global_batch_size=4', '--device=cpu', '--sample_at_end=False', '--eval_iters=1',
    '--eval_interval=2', '--ckpt_interval=2', '--sample_interval=0', '--warmup_iters=1',
)


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize('half', [r'\ud83d', r'\uD83D', r'\uDE00', r'\uDc00'])
def test_half_of_a_surrogate_pair_is_one_line_with_file_and_number(half, refused):
    write('c.jsonl', '{"text": "fine"}\n{"text": "a ' + half + '"}\n')
    error = refused('data.py', '--dataset=text:c.jsonl', '--tokenizer=bytes')
    assert error.startswith('error: c.jsonl, line 2: ') and error.count('\n') == 1
    assert not os.path.exists('data/c-bytes')


def test_a_whole_surrogate_pair_is_a_character():
    write('c.jsonl', r'{"text": "a \uD83D\uDE00"}' + '\n')
    folder = prepare('text:c.jsonl', 'bytes')
    split = next(iter(read_meta(folder)['splits']))
    ids = np.fromfile(f'{folder}/{split}.bin', '<u2')[:-1].tolist()
    assert bytes(ids).decode() == 'a \U0001f600'


def test_a_dangling_link_in_a_folder_of_text_is_one_line(refused):
    os.makedirs('texts')
    write('texts/a.txt', 'words')
    os.symlink('nowhere.txt', 'texts/b.txt')
    error = refused('data.py', '--dataset=text:texts', '--tokenizer=bytes')
    assert error == 'error: texts/b.txt is a link to a file that is not there\n'
    os.remove('texts/b.txt')
    os.symlink('nowhere', 'texts/picture.png')  # which is no text
    assert prepare('text:texts', 'bytes') == 'data/texts-bytes'


@pytest.mark.parametrize(
    'file, kept',
    [('meta.json', 0), ('meta.json', 40), ('train.idx', 0), ('train.idx', 12), ('train.bin', 0)],
)
def test_a_truncated_file_of_data_is_one_line(file, kept, mine, refused):
    with open(f'data/mine/{file}', 'r+b') as f:
        f.truncate(kept)
    error = refused('train.py', '--dataset=mine', *TINY)
    assert error.startswith(f'error: data/mine/{file} ') and error.count('\n') == 1


@pytest.mark.parametrize('lost', ['source', 'tokenizer', 'splits', 'command'])
def test_a_meta_without_a_part_is_one_line(lost, mine, refused):
    meta = json.load(open('data/mine/meta.json'))
    del meta[lost]
    json.dump(meta, open('data/mine/meta.json', 'w'))
    error = refused('train.py', '--dataset=mine', *TINY)
    assert error.startswith('error: data/mine/meta.json ') and error.count('\n') == 1


def test_text_that_is_edited_without_a_change_of_size_is_noticed(refused):
    write('c.txt', 'to be\n\nor not')
    os.makedirs('texts')
    write('texts/c.txt', 'to be\n\nor not')
    for source in ('c.txt', 'texts'):
        prepare(f'text:{source}', 'bytes', 'mine-' + source)
        time = os.stat('c.txt').st_mtime_ns
        for path in ('c.txt', 'texts/c.txt'):
            write(path, 'to be\n\nor now')
            os.utime(path, ns=(time, time))
        command = (f'--dataset=text:{source}', '--tokenizer=bytes', f'--name=mine-{source}')
        assert f'data/mine-{source} was made from' in refused('data.py', *command)
        for path in ('c.txt', 'texts/c.txt'):
            write(path, 'to be\n\nor not')
        assert prepare(f'text:{source}', 'bytes', f'mine-{source}') == f'data/mine-{source}'


def test_a_folder_without_a_hash_is_still_used(mine):
    meta = json.load(open('data/mine/meta.json'))
    del meta['source']['sha256']  # as data.py wrote it before
    json.dump(meta, open('data/mine/meta.json', 'w'))
    assert prepare('text:c.txt', 'bytes', 'mine') == 'data/mine'


def test_the_tokenizer_is_that_of_the_data_unless_another_is_named(mine, here, refused):
    done = here('train.py', '--dataset=mine', '--max_iters=1', *TINY)
    assert done['tokenizer_meta']['name'] == 'bytes'
    error = refused('train.py', '--dataset=mine', '--tokenizer=bpe-300', *TINY)
    assert "holds ids of the tokenizer 'bytes', not 'bpe-300'" in error
    write('config.py', "tokenizer = 'text8'\n")
    error = refused('train.py', 'config.py', '--dataset=mine', *TINY)
    assert "holds ids of the tokenizer 'bytes', not 'text8'" in error


def test_small_py_takes_any_text_and_shows_samples_on_the_way(here, capsys):
    write_words('corpus.txt')
    here(
        'train.py', f'{ROOT}/config/small.py', '--dataset=text:corpus.txt', *TINY, '--max_iters=2',
        '--sample_interval=2',
    )
    output = capsys.readouterr().out
    assert 'training the tokenizer bpe-2048 on text:corpus.txt' in output
    assert '--- sample 0' in output and os.path.exists('out-small/ckpt.pt')


def test_new_text_is_prepared_with_the_ids_of_a_net_and_the_net_is_fine_tuned_on_it(here, refused):
    write_words('old.txt')
    here('train.py', '--dataset=text:old.txt', '--tokenizer=bpe-262', *TINY, '--max_iters=2')
    write('new.txt', '\n\n'.join(f'to be {i} or not to be' for i in range(200)))
    here('data.py', '--dataset=text:new.txt', '--tokenizer=out', '--name=new')
    ours, theirs = read_meta('data/new')['tokenizer'], read_meta('data/old-bpe-262')['tokenizer']
    assert ours == theirs and theirs['vocab_size'] == 263  # the mask, and no second EOS
    tok = get_tokenizer('out')
    assert tok.meta() == theirs
    ids = TokenRows('data/new', 'train', 8, 'concat').document(0)
    assert ids.tolist() == [*tok.encode('to be 0 or not to be'), theirs['eos_id']]

    tuned = here('train.py', '--init_from=out', '--dataset=new', *TINY, '--max_iters=1',
                 '--out_dir=tuned')
    assert tuned['step'] == 1
    assert prepare('text:new.txt', 'out', 'new') == 'data/new'  # nothing to do
    assert find_or_prepare('text:new.txt', 'out') == 'data/new-out'
    shutil.rmtree('data/new')
    assert get_tokenizer('data/old-bpe-262').meta() == theirs
    prepare('text:' + write('other.txt', 'another text, ' * 99), 'bpe-262')
    shutil.copy('data/other-bpe-262/tokenizer.json', 'out')  # not the net's
    error = refused('data.py', '--dataset=text:new.txt', '--tokenizer=out', '--name=new')
    assert 'the net was trained with' in error and error.count('\n') == 1
    with open('out/ckpt.pt', 'r+b') as f:
        f.truncate(100)
    error = refused('data.py', '--dataset=text:new.txt', '--tokenizer=out', '--name=new')
    assert error.startswith('error: out/ckpt.pt does not tell its tokenizer')


def letters(n):
    draw = np.random.default_rng(0)
    return ''.join(draw.choice(list('abcdefghijklmnopqrstuvwxyz '), n))


def test_text8_crop_cuts_training_rows_anywhere_and_others_side_by_side(here):
    text = letters(3000)
    folder = prepare('text8-crop', 'text8', input=write('text8', text))
    tok = get_tokenizer('text8')
    rows = TokenRows(folder, 'train', 256, 'crop')
    assert len(rows) == 2700 - 256 + 1  # every place
    for i in (0, 1, 1234, len(rows) - 1):
        assert tok.decode(rows[i]['x0'][0].tolist()) == text[i:i + 256]
    held_out = TokenRows(folder, 'validation', 50, 'crop')
    assert [tok.decode(ids) for ids in held_out[:]['x0'].tolist()] == [
        text[2700:2750], text[2750:2800], text[2800:2850]]

    # a function of seed and step: what step 3 sees does not depend on how it was reached
    command = (
        'train.py', '--dataset=text8-crop-text8', '--packing=crop', *TINY, '--seed=5',
        '--max_iters=1',
    )
    make = here(*command)['training_batch']
    batch = make(3, 0)['x0']
    n = len(TokenRows(folder, 'train', 16, 'crop'))
    places = permute(np.arange(12, 16), n, 5, 0)
    assert [tok.decode(ids) for ids in batch.tolist()] == [text[i:i + 16] for i in places]
    assert len(set(places % 16)) > 1

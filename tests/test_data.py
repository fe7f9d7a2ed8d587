import itertools
import json
import os
import random
import sys

import numpy as np
import pytest
import torch

import data
from conftest import SHARED, write
from data import TokenRows, get_tokenizer, key_of, pack_wrap, permute, prepare, read_meta

GOLDEN = os.path.join(os.path.dirname(__file__), 'golden')


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def words(rng, n):
    return ' '.join(
        rng.choice(('time', 'mask', "don't", 'token', 'é', '日本', '42', 'x_y', '  two'))
        for _ in range(n)
    )


def corpus(n=200, seed=0):
    rng = random.Random(seed)
    return [words(rng, rng.randint(1, 60)) for _ in range(n)]


# --- keys


@pytest.mark.parametrize('n', [1, 2, 3, 16, 17, 1000, 4097])
def test_permute_is_a_permutation_that_its_key_decides(n):
    one = permute(np.arange(n), n, 5, 0)
    assert sorted(one) == list(range(n))
    assert np.array_equal(one, permute(np.arange(n), n, 5, 0))
    if n >= 16:
        assert not np.array_equal(one, permute(np.arange(n), n, 5, 1))
        assert not np.array_equal(one, np.arange(n))
    # no state: any part, in any order
    assert np.array_equal(permute(np.arange(n)[n // 2 :], n, 5, 0), one[n // 2 :])


def test_permute_mixes_evenly():
    # where one element goes over 6000 keys: chi-square over 60 places (p > 1e-4 below 105)
    n, hits = 60, np.zeros(60)
    for key in range(6000):
        hits[permute(np.array([7]), n, key)[0]] += 1
    assert ((hits - 100) ** 2 / 100).sum() < 105


def test_permute_needs_no_array_of_its_range():
    assert 0 <= permute(np.array([10**15 - 1]), 10**15, 1)[0] < 10**15


def test_keys_differ():
    keys = {
        key_of(seed, step, micro) for seed in range(10) for step in range(50) for micro in range(10)
    }
    assert len(keys) == 5000 and all(0 <= key < 2**63 for key in keys)
    assert key_of(1, 2) != key_of(2, 1) and key_of(-1) != key_of(1)


# --- tokenizers

AWKWARD = [
    '',
    ' ',
    'Hello world',
    "it's  two\n\n\ttabs",
    'naïve 日本語 🙂',
    '<|endoftext|>',
    '<|mask|>',
    ' \n ',
    'a' * 300,
    '\x00\x7f',
]


@pytest.fixture
def trained(tmp_path):
    data.train_bpe(corpus(), 280, str(tmp_path / 'tokenizer.json'))
    return str(tmp_path)


@pytest.mark.parametrize('name', ['bytes', 'bpe-280', 'gpt2', 'gpt2-xlm'])
def test_tokenizers_give_text_back_and_never_a_special_id(name, request):
    if name.startswith('gpt2'):
        request.getfixturevalue('gpt2_vocabulary')
    tok = get_tokenizer(name, request.getfixturevalue('trained'))
    special = {tok.eos_id, tok.bos_id, tok.pad_id, tok.mask_id}
    for text in AWKWARD + corpus(20):
        ids = tok.encode(text)
        assert tok.decode(ids) == text
        assert not special & set(ids)
        assert all(type(i) is int and 0 <= i < tok.vocab_size for i in ids)
    shown = tok.decode(tok.encode('a b') + [tok.mask_id, tok.eos_id] + tok.encode('c'))
    assert shown == 'a b<|mask|><|endoftext|>c'


@pytest.mark.parametrize(
    'name, vocab_size, eos, bos, pad, mask',
    [
        ('bytes', 258, 256, 256, 256, 257),
        ('bpe-280', 281, 0, 0, 0, 280),
        ('gpt2', 50258, 50256, 50256, 50256, 50257),
        ('gpt2-xlm', 50263, 50256, 50258, 50259, 50261),
    ],
)
def test_special_ids(name, vocab_size, eos, bos, pad, mask, request):
    if name.startswith('gpt2'):
        request.getfixturevalue('gpt2_vocabulary')
    tok = get_tokenizer(name, request.getfixturevalue('trained'))
    assert (tok.vocab_size, tok.eos_id, tok.bos_id, tok.pad_id, tok.mask_id) == (
        vocab_size, eos, bos, pad, mask
    )


def test_trained_tokenizer_is_the_same_each_time(tmp_path):
    for name in 'ab':
        data.train_bpe(corpus(), 270, str(tmp_path / name))
    assert (tmp_path / 'a').read_text() == (tmp_path / 'b').read_text()


def test_hugging_face_folder(tmp_path):
    import tokenizers
    import transformers

    base = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(
            {w: i for i, w in enumerate(['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'a', 'b'])},
            unk_token='[UNK]',
        )
    )
    base.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=base, pad_token='[PAD]', unk_token='[UNK]', cls_token='[CLS]',
        sep_token='[SEP]', mask_token='[MASK]'
    ).save_pretrained(tmp_path / 'bertish')
    tok = get_tokenizer(str(tmp_path / 'bertish'))
    # it has a mask of its own
    assert (tok.vocab_size, tok.eos_id, tok.bos_id, tok.pad_id, tok.mask_id) == (7, 3, 2, 0, 4)
    assert tok.encode('a b a') == [5, 6, 5]


def test_unknown_tokenizers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="tokenizer 'no-such-tokenizer' is neither"):
        get_tokenizer('no-such-tokenizer')
    with pytest.raises(FileNotFoundError, match='tokenizer.json is missing'):
        get_tokenizer('bpe-280', str(tmp_path / 'nowhere'))
    with pytest.raises(ValueError, match='at least 257 ids'):
        data.train_bpe(['abc'], 200, str(tmp_path / 'x.json'))


# --- reading text


@pytest.mark.parametrize(
    'text, expected',
    [
        ('one\n\ntwo\n', ['one', 'two']),
        ('one\ntwo\n \t\n\n three\n\n\n', ['one\ntwo', ' three']),
        ('\n \n  first\n', ['  first']),
        ('', []),
        (' \n\n', []),
        ('a\r\n\r\nb', ['a', 'b']),
        ('\ufeffbom', ['bom']),
    ],
)
def test_lines_of_white_space_separate_documents(tmp_path, text, expected):
    path = tmp_path / 't.txt'
    path.write_bytes(text.encode())
    assert [document for _, document, _, _ in data.read_files(str(path))] == expected


@pytest.mark.parametrize('block', [1, 2, 3, 7, 64])
def test_documents_do_not_depend_on_the_size_of_the_blocks_read(tmp_path, monkeypatch, block):
    rng = random.Random(block)
    text = ''.join(rng.choice(('a', 'bc', ' ', '\n', '\n', '\t', 'é')) for _ in range(3000))
    path = write(tmp_path / 't.txt', text)
    whole = [document for _, document, _, _ in data.read_files(path)]
    monkeypatch.setattr(data, 'PIECE', block)
    joined, part = [], ''
    for _, piece, last, _ in data.read_files(path):
        part += piece
        if last:
            joined.append(part)
            part = ''
    assert joined == whole and part == '' and len(whole) > 50


def test_a_document_longer_than_a_piece_has_the_tokens_of_the_whole(
    tmp_path, monkeypatch, gpt2_vocabulary
):
    text = '\n'.join(corpus(300))  # one document, no blank line
    path = write(tmp_path / 't.txt', text)
    monkeypatch.setattr(data, 'PIECE', 500)
    folder = prepare('text:' + path, 'gpt2', 'long')
    meta = read_meta(folder)
    [(split, counts)] = meta['splits'].items()
    assert counts['documents'] == 1 and counts['bytes'] == len(text.encode())
    assert np.fromfile(os.path.join(folder, f'{split}.bin'), '<u2').tolist() == get_tokenizer(
        'gpt2'
    ).encode(text) + [50256]


def test_jsonl_and_folders(tmp_path):
    os.makedirs('corpus/deep')
    write('corpus/b.jsonl', '{"text": "two\\n\\nlines"}\n\n{"text": ""}\n')
    write('corpus/a.txt', 'one\n')
    write('corpus/deep/c.txt', 'three\n')
    write('corpus/ignored.bin', 'x')
    assert [document for _, document, _, _ in data.read_files('corpus')] == [
        'one',
        'two\n\nlines',
        '',
        'three',
    ]
    for bad in ('{"txt": "x"}\n', 'not json\n', '{"text": 3}\n', '[1]\n'):
        with pytest.raises(ValueError, match='bad.jsonl, line 2'):
            list(data.read_files(write('bad.jsonl', '{"text": "x"}\n' + bad)))
    with pytest.raises(FileNotFoundError, match='is not there'):
        list(data.read_files('nowhere.txt'))
    os.makedirs('empty')
    with pytest.raises(FileNotFoundError, match='without .txt or .jsonl'):
        list(data.read_files('empty'))
    with open('latin.txt', 'wb') as f:
        f.write(b'caf\xe9\n')
    with pytest.raises(ValueError, match='is not UTF-8'):
        list(data.read_files('latin.txt'))


def test_stdlib_is_its_topics_and_docstrings_without_tests_and_repetitions(tmp_path, monkeypatch):
    from pydoc_data.topics import topics

    for path, text in (
        ('a.py', '"""Same."""\ndef f():\n    """Of f.\n\n    More."""\n'),
        ('json/b.py', '"""Same."""\nclass A:\n    "Of A."\n    async def g(self): "Of g."\n'),
        ('json/broken.py', '"""None."""\ndef ('),
        ('json/none.py', 'x = 1'),
        ('test/c.py', '"""A test."""'),
        ('site-packages/d.py', '"""Not theirs."""'),
    ):
        os.makedirs(os.path.dirname(tmp_path / path), exist_ok=True)
        write(tmp_path / path, text)
    monkeypatch.setattr('sysconfig.get_path', lambda name: str(tmp_path))
    found = data.stdlib_documents.__wrapped__()
    shown = {text.strip() for text in topics.values()}
    assert set(found[: len(shown)]) == shown
    assert found[len(shown) :] == ['Same.', 'Of f.\n\nMore.', 'Of A.', 'Of g.']


@pytest.mark.slow
def test_stdlib_is_english_without_tests_or_repetitions():
    documents = [text for _, text, _, _ in data.read_stdlib()]
    assert len(documents) == len(set(documents)) > 3000 and sum(map(len, documents)) > 1e6
    text = '\n'.join(documents)
    assert 'The "for" statement is used to iterate' in text and 'Return a shallow copy' in text


# --- preparing


def test_bins_hold_every_document_with_its_eos(tmp_path):
    documents = corpus()
    folder = prepare('text:' + write('c.txt', '\n\n'.join(documents)), 'bytes')
    assert folder == os.path.join('data', 'c-bytes')
    assert sorted(os.listdir('data/c-bytes')) == [
        'meta.json', 'train.bin', 'train.idx', 'validation.bin', 'validation.idx'
    ]
    meta, found = read_meta(folder), {}
    for split, counts in meta['splits'].items():
        ids = np.fromfile(f'{folder}/{split}.bin', '<u2')
        offsets = np.fromfile(f'{folder}/{split}.idx', '<i8')
        found[split] = [
            bytes(ids[a : b - 1].tolist()).decode() for a, b in itertools.pairwise(offsets)
        ]
        assert (ids[offsets[1:] - 1] == 256).all()
        assert offsets[0] == 0
        assert counts['tokens'] == len(ids)
        assert counts['documents'] == len(found[split])
        assert counts['bytes'] == sum(len(d.encode()) for d in found[split])
    assert sorted(found['train'] + found['validation']) == sorted(documents)
    assert [d for d in documents if d in set(found['train'])] == found['train']  # in their order
    assert set(meta) == {'source', 'command', 'tokenizer', 'dtype', 'splits'}
    assert meta['dtype'] == 'uint16'


def test_a_twentieth_of_the_documents_is_validation():
    splits = [
        split
        for split, *_ in data.documents(
            'text:' + write('c.txt', '\n\n'.join(map(str, range(20000))))
        )
    ]
    assert abs(splits.count('validation') / 20000 - 0.05) < 4 * (0.05 * 0.95 / 20000) ** 0.5
    again = [
        split
        for split, *_ in data.documents('text:' + write('d.txt', '\n\n'.join(map(str, range(500)))))
    ]
    assert again == splits[:500]


def test_a_second_run_finds_the_bins_and_does_nothing(run, tmp_path, refused):
    write('c.txt', '\n\n'.join(corpus()))
    first = run('data.py', '--dataset=text:c.txt', '--tokenizer=bpe-280', '--name=mine')
    assert 'tokenizer bpe-280, 281 ids' in first.stdout
    before = {f: os.stat(f'data/mine/{f}').st_mtime_ns for f in os.listdir('data/mine')}
    again = run('data.py', '--dataset=text:c.txt', '--tokenizer=bpe-280', '--name=mine')
    assert before == {f: os.stat(f'data/mine/{f}').st_mtime_ns for f in os.listdir('data/mine')}
    assert 'training the tokenizer' in first.stdout and 'training the tokenizer' not in again.stdout
    write('c.txt', '\n\n'.join(corpus(100)))  # the text has changed
    error = refused('data.py', '--dataset=text:c.txt', '--tokenizer=bpe-280', '--name=mine')
    assert error.startswith('error: data/mine was made from') and error.count('\n') == 1
    write('d.txt', 'other')
    assert 'was made from' in refused(
        'data.py', '--dataset=text:d.txt', '--tokenizer=bpe-280', '--name=mine'
    )


def test_a_broken_folder_is_refused_with_the_command_that_rebuilds_it_and_rebuilt_by_it(run):
    write('c.txt', '\n\n'.join(corpus()))
    folder = prepare('text:c.txt', 'bytes')
    whole = open(f'{folder}/train.bin', 'rb').read()
    with open(f'{folder}/train.bin', 'wb') as f:
        f.write(whole[:-2])
    command = 'python data.py --dataset=text:c.txt --tokenizer=bytes --name=c-bytes'
    with pytest.raises(
        ValueError,
        match=r'train.bin holds [\d,]+ bytes, where meta.json says [\d,]+: rebuild it with '
        + command,
    ):
        TokenRows(folder, 'train', 16, 'concat')
    run(*command.split()[1:])
    assert open(f'{folder}/train.bin', 'rb').read() == whole
    os.remove(f'{folder}/validation.idx')
    with pytest.raises(ValueError, match='validation.idx is missing'):
        read_meta(folder)
    prepare('text:c.txt', 'bytes')
    meta = json.load(open(f'{folder}/meta.json'))
    meta['dtype'] = 'uint32'
    json.dump(meta, open(f'{folder}/meta.json', 'w'))
    with pytest.raises(ValueError, match='where meta.json says'):
        read_meta(folder)
    write(f'{folder}/meta.json', '{"spl')
    with pytest.raises(ValueError, match='is not what data.py writes'):
        read_meta(folder)


def test_nothing_half_written_stays_when_preparing_fails(tmp_path):
    write('c.jsonl', '{"text": "fine"}\n' * 1000 + 'broken\n')
    with pytest.raises(ValueError, match='line 1001'):
        prepare('text:c.jsonl', 'bytes')
    assert [name for name in os.listdir('data') if not name.endswith('.lock')] == []


def test_large_ids_take_four_bytes(monkeypatch):
    monkeypatch.setattr(
        data,
        'get_tokenizer',
        lambda name, folder: data.Tokenizer(
            'big', lambda texts: data.one_after_the_other([[70000, 3]] * len(texts)), str, 70001
        ),
    )
    folder = prepare('text:' + write('c.txt', '\n\n'.join('abc')), 'big')
    assert read_meta(folder)['dtype'] == 'uint32'
    rows = TokenRows(folder, 'train', 3, 'concat')
    assert rows[[0]]['x0'].tolist() == [[70000, 3, 70001]]


def test_local_copies_of_hub_datasets(tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    os.makedirs('owt')
    texts = corpus(50)
    pyarrow.parquet.write_table(pyarrow.table(dict(text=texts)), 'owt/train-0.parquet')
    monkeypatch.setitem(
        data.DATASETS,
        'openwebtext',
        data.partial(data.read_hub, 'Skylion007/openwebtext', validation_last=10),
    )
    meta = read_meta(prepare('openwebtext', 'bytes', input='owt'))
    # the last ones
    assert (meta['splits']['train']['documents'], meta['splits']['validation']['documents']) == (
        40,
        10,
    )
    ids = np.fromfile('data/openwebtext-bytes/validation.bin', '<u2')
    assert bytes(ids[: len(texts[40].encode())].tolist()).decode() == texts[40]
    os.makedirs('split')
    for split, some in (('train', texts[:30]), ('validation', texts[30:])):
        pyarrow.parquet.write_table(pyarrow.table(dict(text=some)), f'split/{split}-0.parquet')
    meta = read_meta(prepare('owt-gpt2-1024-split', 'bytes', input='split'))
    assert (meta['splits']['train']['documents'], meta['splits']['validation']['documents']) == (
        30,
        20,
    )
    with pytest.raises(
        ValueError, match='the last 100000 documents are validation, but there are 50'
    ):
        list(data.read_hub('x', validation_last=100_000, input='owt'))
    with pytest.raises(ValueError, match="no text in its column 'body'"):
        list(data.read_hub('x', column='body', input='owt'))


def test_hub_without_a_network_says_so(refused):
    error = refused('data.py', '--dataset=openwebtext', '--tokenizer=bytes').splitlines()[-1]
    assert error.startswith("error: Skylion007/openwebtext, split 'train', cannot be read")
    assert '--input=FOLDER' in error


def test_words_are_joined_as_the_release_does():
    for folder in (GOLDEN, os.path.join(SHARED, 'fixtures')):
        if os.path.isdir(folder):
            with open(os.path.join(folder, 'text_expected.json')) as f:
                expected = json.load(f)['detokenize']
            assert set(expected) == set(data.CLEAN_UP)
            for name, pairs in expected.items():
                assert [data.detokenize(name, text) for text, _ in pairs] == [
                    joined for _, joined in pairs
                ], name
    assert data.detokenize('wikitext103', 'a , b') == 'a, b'
    assert data.detokenize('scientific_papers_pubmed', 'a , b') == 'a, b'
    assert (
        data.detokenize('ag_news', 'a , b')
        == data.detokenize('text:wikitext.txt', 'a , b')
        == 'a , b'
    )


def decoded(folder, split):
    rows = data.TokenRows(folder, split, 1, 'concat')
    tok = data.get_tokenizer(rows.meta['tokenizer']['name'], folder)
    return [
        tok.decode(rows.tokens[start : end - 1]) for start, end in itertools.pairwise(rows.offsets)
    ]


@pytest.mark.parametrize(
    'name, split, file, text, expected',
    [
        (
            'wikitext2',
            'validation',
            'w.txt',
            ' = A = \n \n one , two \n',
            [' = A =\n', '', ' one, two\n'],
        ),
        ('wikitext103', 'validation', 'w.jsonl', '{"text": ""}\n{"text": "a . b"}\n', ['', 'a. b']),
        ('ptb', 'validation', 'p.txt', " it 's N \n $ N N \n", ["it's N", '$1 N']),
        ('ptb', 'validation', 'p.jsonl', '{"sentence": "<unk> is"}', ['? is']),
        (
            'lambada',
            'validation',
            'l.jsonl',
            '{"text": "\u201chi\u201d he said "}',
            ['\n"hi" he said'],
        ),
        ('lm1b', 'test', 'l.txt', 'one , two .\nthree ?\n', ['one, two.', 'three?']),
        ('ag_news', 'test', 'a.txt', 'news , as it is\nmore', ['news , as it is', 'more']),
        (
            'scientific_papers_arxiv',
            'validation',
            's.jsonl',
            '{"article": "we ( the ) show"}',
            ['we (the) show'],
        ),
        (
            'scientific_papers_pubmed',
            'validation',
            's.jsonl',
            '{"text": "a [ 1 ] , b"}',
            ['a [1], b'],
        ),
    ],
)
def test_benchmarks_from_a_local_file_of_the_same_form(name, split, file, text, expected):
    folder = prepare(name, 'bytes', input=write(file, text))
    assert list(data.read_meta(folder)['splits']) == [split] and data.BENCHMARKS[name] == split
    assert decoded(folder, split) == expected


def test_text8_has_35_characters_and_pieces_of_256():
    text = ''.join(random.Random(0).choice('abcdefghijklmnopqrstuvwxyz ') for _ in range(30_000))
    folder = prepare('text8', 'text8', input=write('text8', text))
    meta = data.read_meta(folder)
    assert (
        meta['tokenizer']
        | dict(name='text8', vocab_size=35, eos_id=3, bos_id=2, pad_id=5, mask_id=4)
        == meta['tokenizer']
    )
    assert ''.join(decoded(folder, 'train')) == text[: 27_000 // 256 * 256]
    assert ''.join(decoded(folder, 'test')) == text[28_500 : 28_500 + 1500 // 256 * 256]
    rows = data.TokenRows(folder, 'test', 256, 'wrap')[:]['x0']
    assert (rows[:, 0] == 2).all() and (rows[:, -1] == 3).all() and rows.max() < 35
    tok = data.get_tokenizer('text8')
    assert tok.encode('az !') == [8, 33, 34, 7] and tok.decode([4, 8, 34, 3]) == '[MASK]a [EOS]'


def test_what_is_not_there_is_refused():
    with pytest.raises(ValueError, match='empty.txt holds no document'):
        prepare('text:' + write('empty.txt', ' \n\n'), 'bytes')
    assert not os.path.exists('data/empty-bytes')
    with pytest.raises(ValueError, match='takes the place of the hub'):
        prepare('stdlib', 'bytes', input='x.jsonl')
    with pytest.raises(ValueError, match="name='a/b'"):
        prepare('stdlib', 'bytes', 'a/b')
    with pytest.raises(
        ValueError, match="dataset 'openwebtex' is not known; the nearest is 'openwebtext'"
    ):
        prepare('openwebtex', 'bytes')
    with pytest.raises(
        FileNotFoundError,
        match='make it with python data.py --dataset=openwebtext --tokenizer=gpt2',
    ):
        data.find_or_prepare('openwebtext', 'gpt2')
    with pytest.raises(FileNotFoundError, match="'nowhere' is none of stdlib"):
        data.find_or_prepare('nowhere', 'gpt2')
    prepare('text:' + write('c.txt', '\n\n'.join(corpus())), 'bytes', 'mine')
    assert data.find_or_prepare('mine', 'bytes') == os.path.join('data', 'mine')
    with pytest.raises(ValueError, match="holds ids of the tokenizer 'bytes', not 'gpt2'"):
        data.find_or_prepare('mine', 'gpt2')


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_memory_does_not_grow_with_the_corpus(run, tmp_path):
    line = write('part.txt', '\n\n'.join(corpus(2000)) + '\n\n')
    peaks = []
    for copies in (20, 200):
        with open('big.txt', 'w') as f:
            for _ in range(copies):
                f.write(open(line).read())
        code = (
            'import resource, sys\n'
            f'sys.path.insert(0, {os.path.dirname(data.__file__)!r})\n'
            'import data\n'
            f"data.prepare('text:big.txt', 'bytes', 'c{copies}')\n"
            'print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)\n'
        )
        write('measure.py', code)
        peaks.append(int(run(tmp_path / 'measure.py', fork=False).stdout.split()[-1]))
    assert os.path.getsize('big.txt') > 50e6 and peaks[1] < peaks[0] + 60, peaks  # MiB


# --- rows


def test_wrap_matches_the_release():
    for folder in (GOLDEN, os.path.join(SHARED, 'fixtures')):
        if os.path.isdir(folder):
            expected = json.load(open(os.path.join(folder, 'text_expected.json')))['pack']
            rows = pack_wrap(
                expected['documents'], expected['block_size'], expected['bos'], expected['eos']
            )
            assert rows.dtype == np.int64 and rows.tolist() == expected['rows']


@pytest.fixture
def folder():
    return prepare('text:' + write('c.txt', '\n\n'.join(corpus())), 'bytes')


def stream_of(folder, split='train'):
    return np.fromfile(f'{folder}/{split}.bin', '<u2').astype(np.int64)


def documents_of(folder, split='train'):
    offsets = np.fromfile(f'{folder}/{split}.idx', '<i8')
    return [stream_of(folder)[a:b].tolist() for a, b in itertools.pairwise(offsets)]


def test_wrap_rows(folder):
    rows = TokenRows(folder, 'train', 32, 'wrap')
    expected = pack_wrap([d[:-1] for d in documents_of(folder)], 32, 256, 256)
    batch = rows[np.arange(len(rows))]
    assert torch.equal(batch['x0'], torch.from_numpy(expected)) and batch['x0'].dtype == torch.int64
    assert batch['maskable'].all()
    assert batch['scored'].all()
    assert batch['maskable'].dtype == torch.bool
    assert not batch['document'][:, [0, -1]].any() and batch['document'][:, 1:-1].all()


def test_concat_rows(folder):
    rows, stream = TokenRows(folder, 'train', 32, 'concat'), stream_of(folder)
    batch = rows[: len(rows)]
    assert len(rows) == len(stream) // 32
    assert batch['x0'].flatten().tolist() == stream[: len(rows) * 32].tolist()
    assert all(batch[key].all() for key in ('maskable', 'scored', 'document'))


def test_pad_rows(folder):
    documents = documents_of(folder)
    assert min(map(len, documents)) < 64 < max(map(len, documents))
    for loss_on_padding in (True, False):
        rows = TokenRows(folder, 'train', 64, 'pad', loss_on_padding)
        batch = rows[torch.arange(len(rows))]
        for document, ids, known, scored, maskable in zip(
            documents,
            *(batch[key].tolist() for key in ('x0', 'document', 'scored', 'maskable')),
            strict=True,
        ):
            n = min(len(document), 64)
            assert ids == document[:64] + [256] * (64 - n)
            assert known == [True] * n + [False] * (64 - n)
            assert scored == maskable == ([True] * 64 if loss_on_padding else known)
        assert batch['attention_mask'].all() == loss_on_padding


def test_rows_are_taken_in_the_order_asked_for(folder):
    rows = TokenRows(folder, 'train', 32, 'concat')
    every = rows[:]['x0']
    assert torch.equal(rows[[5, 0, 5]]['x0'], every[[5, 0, 5]])
    assert torch.equal(rows[3]['x0'], every[3:4])
    for bad in ([len(rows)], [-1]):
        with pytest.raises(IndexError):
            rows[bad]


def test_sentence_rows(folder):
    documents = documents_of(folder)
    rows = TokenRows(folder, 'train', 64, 'sentence')
    batch = rows[:]
    for document, ids, known, scored in zip(
        documents, *(batch[key].tolist() for key in ('x0', 'document', 'scored')), strict=True
    ):
        text = document[:-1][:62]
        assert ids == [256, *text, 256] + [256] * (62 - len(text))
        assert scored == [True] * (len(text) + 2) + [False] * (62 - len(text))
        assert known == [False] + [True] * (len(text) + 1) + [False] * (62 - len(text))
    assert batch['maskable'].all() and batch['attention_mask'].all()


def test_rows_that_hold_nonsense_are_refused(folder):
    tokens = np.fromfile(f'{folder}/train.bin', '<u2')
    tokens[3] = 60000
    tokens.tofile(f'{folder}/train.bin')
    with pytest.raises(
        ValueError,
        match='holds the id 60000, outside of the 258 ids of its tokenizer: '
        'rebuild it with python data.py',
    ):
        TokenRows(folder, 'train', 16, 'concat')[[0]]
    offsets = np.fromfile(f'{folder}/train.idx', '<i8')
    offsets[5] = 10**12
    offsets.tofile(f'{folder}/train.idx')
    with pytest.raises(ValueError, match='do not rise at document 5'):
        TokenRows(folder, 'train', 16, 'pad')[[5]]


def test_impossible_rows_are_refused(folder):
    with pytest.raises(ValueError, match='less than one row of 10000'):
        TokenRows(folder, 'validation', 10000, 'wrap')
    with pytest.raises(ValueError, match="packing 'wrapped' is not known"):
        TokenRows(folder, 'train', 32, 'wrapped')
    with pytest.raises(ValueError, match="has no split 'test', only train, validation"):
        TokenRows(folder, 'test', 32, 'wrap')
    with pytest.raises(ValueError, match='too short'):
        TokenRows(folder, 'train', 2, 'wrap')
    with pytest.raises(FileNotFoundError, match='is not a data folder'):
        TokenRows('data/nowhere', 'train', 32, 'wrap')


def test_every_twentieth_document_or_so_is_validation_by_a_hash_of_its_number(tmp_path):
    path = tmp_path / 'c.txt'
    path.write_text('\n\n'.join(f'document {i}' for i in range(10_000)))
    splits = [split for split, *_ in data.documents(f'text:{path}')]
    by_hash = ['train' if data.key_of(i) % 20 else 'validation' for i in range(10_000)]
    assert splits == by_hash

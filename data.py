"""
Text -> token bins -> rows of a batch.

    python data.py --dataset=stdlib --tokenizer=bpe-2048
    python data.py --dataset=text:corpus.txt --name=corpus --tokenizer=gpt2
    python data.py --dataset=openwebtext

data/<name>/ then holds, per split, <split>.bin (token ids, documents one after another, each closed by its EOS), <split>.idx
(int64 offsets of the documents, one more than there are) and meta.json. Rows are cut out at training time (TokenRows), so that
one preparation serves every model.
"""
import ast
import contextlib
import difflib
import functools
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import sys
import sysconfig
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from filelock import FileLock
from tqdm import tqdm

dataset = 'stdlib'  # a name in DATASETS, or text:PATH (a text file, a .jsonl with a "text" field, or a folder of them)
tokenizer = 'gpt2'  # gpt2, gpt2-xlm, bpe-N (trained here, N ids), bytes, or a Hugging Face name or folder
name = None         # the bins go to data/<name>; None: <dataset>-<tokenizer>
input = None        # a local file or folder of the same form, in place of the hub's
streaming = True    # hub datasets: read while they download; False: download first

# -----------------------------------------------------------------------------
# keys for everything random: a function of integers, never of a stream that has been running


MASK64 = 2 ** 64 - 1


def splitmix64(x):
    """A good 64-bit hash (Steele et al. 2014) of an integer below 2^64, or of a uint64 array."""
    x = (x + 0x9E3779B97F4A7C15) & MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def key_of(*numbers):
    """One 63-bit seed from several whole numbers, such as (seed, step, micro-batch)."""
    key = 0
    for number in numbers:
        key = splitmix64(key ^ (int(number) & MASK64))
    return key >> 1


def permute(index, n, *key):
    """The images of index (k,) under a random permutation of range(n) that key alone decides. It is a small Feistel network
    on the next power of four, walked until the image lies in the range, so that no array of length n is ever made."""
    half = math.ceil((n - 1).bit_length() / 2) or 1
    low = 2 ** half - 1
    round_keys = [key_of(*key, i) for i in range(6)]
    image = np.array(index, dtype=np.uint64)
    outside = np.ones(len(image), dtype=bool)
    while outside.any():
        left, right = image[outside] >> half, image[outside] & low
        for round_key in round_keys:
            left, right = right, left ^ (splitmix64(right ^ round_key) & low)
        image[outside] = left << half | right
        outside = image >= n
    return image.astype(np.int64)


# -----------------------------------------------------------------------------
# tokenizers


class Tokenizer:
    """encode(str) -> ids, decode(ids) -> str, and the special ids. Text that looks like a special token is encoded as text.
    encode_batch: list of str -> the ids of all of them one after the other, an array, and where each of them ends there;
    decode_ids: ids that the base tokenizer knows -> str; named: id -> text of the ids that it does not know."""

    def __init__(self, name, encode_batch, decode_ids, base_size, eos_id=None, bos_id=None, pad_id=None, mask_id=None, named=(), sha256=None):
        self.name, self.encode_batch, self.decode_ids, self.named, self.sha256 = name, encode_batch, decode_ids, dict(named), sha256
        size = base_size + len(self.named)
        for role, missing in (('eos_id', eos_id is None), ('mask_id', mask_id is None)):
            if missing:
                self.named[size] = '<|endoftext|>' if role == 'eos_id' else '<|mask|>'
                eos_id, mask_id = (size, mask_id) if role == 'eos_id' else (eos_id, size)
                size += 1
        self.vocab_size, self.eos_id, self.mask_id = size, eos_id, mask_id
        self.bos_id = eos_id if bos_id is None else bos_id
        self.pad_id = eos_id if pad_id is None else pad_id

    def encode(self, text):
        return self.encode_batch([text])[0].tolist()

    def decode(self, ids):
        text, run = [], []
        for i in [int(i) for i in ids] + [None]:
            if i is not None and i not in self.named:
                run.append(i)
                continue
            if run:
                text.append(self.decode_ids(run))
            text.append('' if i is None else self.named[i])
            run = []
        return ''.join(text)

    def meta(self):
        """What tells it from others; sha256 is that of the file of a tokenizer trained here."""
        return {key: getattr(self, key) for key in ('name', 'vocab_size', 'eos_id', 'bos_id', 'pad_id', 'mask_id', 'sha256')}


def one_after_the_other(rows):
    """Sequences of ids -> the ids of all, an array, and where each sequence ends."""
    return np.concatenate([np.asarray(row, dtype=np.int64) for row in rows]), np.cumsum([len(row) for row in rows])


GPT2_XLM = ('<|cls|>', '<|bos|>', '<|pad|>', '<|unk|>', '<|mask|>', '<|sep|>')  # 50257 and on


def gpt2_tokenizer(name):
    import tiktoken
    try:
        base = tiktoken.get_encoding('gpt2')
    except Exception as error:  # requests' own, where there is no network
        raise ValueError("GPT-2's vocabulary is not on this machine and cannot be downloaded: set TIKTOKEN_CACHE_DIR to a folder that "
                         f'holds it ({type(error).__name__})') from None

    threads = threading.local()

    def encode_batch(texts):
        """All texts in one call, which holds no lock, joined by <|endoftext|>, unless one of them holds these letters itself. Each thread has an
        encoder of its own: the regular expressions of one are a seventh faster for the thread that used them first."""
        if not hasattr(threads, 'base'):
            threads.base = tiktoken.Encoding('gpt2', pat_str=base._pat_str, mergeable_ranks=base._mergeable_ranks, special_tokens=base._special_tokens)
        joined = '<|endoftext|>'.join(texts)
        if joined.count('<|endoftext|>') >= len(texts):
            return one_after_the_other([threads.base.encode_ordinary(text) for text in texts])
        ids = threads.base.encode_to_numpy(joined, allowed_special='all')
        ends = np.flatnonzero(ids == 50256)
        return np.delete(ids, ends), np.append(ends - np.arange(len(ends)), len(ids) - len(ends))

    if name == 'gpt2':
        return Tokenizer(name, encode_batch, base.decode, 50257, eos_id=50256)
    named = {50257 + i: text for i, text in enumerate(GPT2_XLM)}
    return Tokenizer(name, encode_batch, base.decode, 50257, eos_id=50256, bos_id=50258, pad_id=50259, mask_id=50261, named=named)


def bpe_tokenizer(name, folder):
    import tokenizers
    path = os.path.join(folder or '', 'tokenizer.json')
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is missing: the tokenizer '{name}' is trained by data.py and saved beside the bins")
    try:
        base = tokenizers.Tokenizer.from_file(path)
    except Exception as error:  # tokenizers' own
        raise ValueError(f'{path} is not the file of a tokenizer ({error}): prepare the data again') from None
    base.encode_special_tokens = True  # "<|endoftext|>" in a text is text
    encode_batch = lambda texts: one_after_the_other([encoding.ids for encoding in base.encode_batch(texts, add_special_tokens=False)])
    decode = lambda ids: base.decode(ids, skip_special_tokens=False)
    with open(path, 'rb') as f:
        sha256 = hashlib.sha256(f.read()).hexdigest()
    return Tokenizer(name, encode_batch, decode, base.get_vocab_size(), eos_id=base.token_to_id('<|endoftext|>'), sha256=sha256)


def hugging_face_tokenizer(name):
    import transformers
    try:
        base = transformers.AutoTokenizer.from_pretrained(name, split_special_tokens=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer '{name}' is neither gpt2, gpt2-xlm, bytes, text8 or bpe-N nor a Hugging Face folder or name that can be "
                         f'loaded ({str(error).strip().splitlines()[0]})') from None
    encode_batch = lambda texts: one_after_the_other(base(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)['input_ids'])
    first = lambda *ids: next((i for i in ids if i is not None), None)
    return Tokenizer(name, encode_batch, base.decode, len(base), eos_id=first(base.eos_token_id, base.sep_token_id),
                     bos_id=first(base.bos_token_id, base.cls_token_id), pad_id=base.pad_token_id, mask_id=base.mask_token_id)


def get_tokenizer(name, folder=None):
    """The tokenizer of that name: 'gpt2', 'gpt2-xlm', 'bytes', 'text8' (35 ids, of characters), 'bpe-N' (read from folder/tokenizer.json), or a Hugging Face name
    or folder. It keeps its own ids, gets an EOS if it has none and then, last, a mask if it has none; BOS and padding are EOS where
    it has none. Raises ValueError or FileNotFoundError."""
    if name in ('gpt2', 'gpt2-xlm'):
        return gpt2_tokenizer(name)
    if name == 'text8':
        named = dict(enumerate(('[CLS]', '[SEP]', '[BOS]', '[EOS]', '[MASK]', '[PAD]', '[RESERVED]', '[UNK]')))
        letters = 'abcdefghijklmnopqrstuvwxyz '
        ids = np.full(256, 7, dtype=np.uint8)
        ids[np.frombuffer(letters.encode(), dtype=np.uint8)] = np.arange(8, 35)
        return Tokenizer(name, lambda texts: one_after_the_other([ids[np.frombuffer(text.encode('latin-1', errors='replace'), dtype=np.uint8)] for text in texts]),
                         lambda found: ''.join(letters[i - 8] for i in found), 27, eos_id=3, bos_id=2, pad_id=5, mask_id=4, named=named)
    if name == 'bytes':
        return Tokenizer(name, lambda texts: one_after_the_other([np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]),
                         lambda ids: bytes(ids).decode(errors='replace'), 256)
    if re.fullmatch(r'bpe-\d{1,7}', name):
        return bpe_tokenizer(name, folder)
    return hugging_face_tokenizer(name)


def train_bpe(texts, size, path):
    """Train a byte-level BPE of `size` ids, EOS included, on an iterator of texts and save it at path."""
    import tokenizers
    base = tokenizers.Tokenizer(tokenizers.models.BPE())
    base.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    base.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    if size <= len(alphabet):
        raise ValueError(f'tokenizer bpe-{size}: a byte-level BPE has at least {len(alphabet) + 1} ids, 256 bytes and EOS')
    base.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=['<|endoftext|>'], initial_alphabet=sorted(alphabet), show_progress=False))
    base.save(path)


# -----------------------------------------------------------------------------
# sources of text. A reader is a generator of (split, text, last, total): split None leaves the choice to a hash of the document's
# index; last is False where the document goes on in the next item; total is the number of documents, None if it is not known.

PIECE = 1 << 20                            # characters: longer documents go through in pieces
BLANK = re.compile(r'\n(?:[^\S\n]*\n)+')    # lines of nothing but white space
LEADING, TRAILING = re.compile(r'\A(?:[^\S\n]*\n)+'), re.compile(r'(?:\n[^\S\n]*)+\Z')
CUT = re.compile(r'\S(?=\s\S)')            # before white space alone between two words, where GPT-2's pattern cuts too


def read_plain_text(path):
    """The documents of a text file of any size, in pieces of at most a few MB."""
    rest, inside = '', False  # inside: a part of the document has gone through
    with open(path, encoding='utf-8-sig') as f:
        while block := f.read(PIECE):
            *whole, rest = BLANK.split(rest + block)
            if whole and not inside:                 # all others begin after blank lines
                whole[0] = LEADING.sub('', whole[0])
            for text in whole if inside or whole and whole[0].strip() else whole[1:]:
                yield None, text, True, None
            inside = inside and not whole
            rest = rest if inside else LEADING.sub('', rest)
            if len(rest) > 2 * PIECE and (cut := CUT.search(rest, PIECE)):
                yield None, rest[:cut.end()], False, None
                rest, inside = rest[cut.end():], True
    if inside or rest.strip():
        yield None, TRAILING.sub('', rest), True, None


def read_jsonl(path, column='text'):
    with open(path, encoding='utf-8-sig') as f:
        for number, line in enumerate(f, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                    text = row[column if column in row else 'text']
                    if '\\ud' in line:
                        text.encode()  # half of a surrogate pair is no text
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    text = None
                if not isinstance(text, str):
                    raise ValueError(f'{path}, line {number}: not a JSON object with a "{column}" field that holds a string')
                yield None, text, True, None


def read_lines(path, keep_newline=False):
    """Every line of a text file is a document, an empty one too, as the rows of a benchmark on the hub are."""
    with open(path, encoding='utf-8-sig', newline='\n') as f:
        for line in f:
            yield None, (line if line.strip() else '') if keep_newline else line.strip(), True, None


def read_text8(input=None, streaming=True):
    """text8 in pieces of 256 characters, of which the first 90% are train, 5% validation, 5% test (Austin et al. 2021, appendix B.1).
    input: the file."""
    if input:
        with open(input, encoding='ascii', errors='replace') as f:
            whole = f.read().strip('\n')
        ends = len(whole) * 90 // 100, len(whole) * 95 // 100, len(whole)
        parts = zip(('train', 'validation', 'test'), (whole[start:end] for start, end in zip((0, *ends), ends)))
    else:
        parts = ((split, text) for split, text, _, _ in read_hub('afmck/text8', splits=('train', 'validation', 'test')))
    for split, text in parts:
        for i in range(0, len(text) - 255, 256):
            yield split, text[i:i + 256], True, None


def read_files(path, read_text=read_plain_text, column='text'):
    """A text file, a .jsonl file, or a folder of them in the order of their names."""
    paths = [path]
    if os.path.isdir(path):
        paths = sorted(os.path.join(where, file) for where, _, files in os.walk(path) for file in files if file.endswith(('.txt', '.jsonl')))
    if not paths or not os.path.exists(path):
        raise FileNotFoundError(f'{path} is ' + ('a folder without .txt or .jsonl files' if os.path.isdir(path) else 'not there'))
    for file in paths:
        try:
            yield from read_jsonl(file, column) if file.endswith('.jsonl') else read_text(file)
        except UnicodeDecodeError as error:
            raise ValueError(f'{file} is not UTF-8 text ({error.reason} at byte {error.start} of a block)') from None


@functools.cache
def stdlib_documents():
    from pydoc_data.topics import topics
    library, documents = sysconfig.get_path('stdlib'), dict.fromkeys(topics[topic].strip() for topic in sorted(topics))
    for where, folders, files in os.walk(library):
        folders[:] = sorted(set(folders) - {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages'})
        for file in sorted(file for file in files if file.endswith('.py')):
            with open(os.path.join(where, file), 'rb') as f:
                try:
                    tree = ast.parse(f.read())
                except (SyntaxError, ValueError):
                    continue  # a template or a broken file: no documentation in it
            for node in ast.walk(tree):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                    documents[(ast.get_docstring(node) or '').strip()] = None
    documents.pop('', None)
    return list(documents)


def read_stdlib(input=None, streaming=True):
    """English that every CPython carries: the topics of its help() and the docstrings of the standard library's modules, read with
    ast and not by importing them. Test packages are left out, and so is every repetition."""
    for text in stdlib_documents():
        yield None, text, True, len(stdlib_documents())


def read_hub(repository, splits=('train',), validation_last=0, column='text', keep=None, revision=None, config=None, files=None, input=None, streaming=True):
    """A Hugging Face dataset, or a local copy of it in the folder `input`. splits: of the hub, or a dict from the hub's to ours.
    validation_last: so many documents at the end of the only split are validation; where there is neither that nor a second split nor a
    dict, a hash chooses. keep: a test that rows must pass. files: the pattern of a split's files."""
    import datasets
    for split in splits:
        try:
            named = {} if input or not files else dict(data_files={split: files.format(split=split)})
            rows = datasets.load_dataset(input or repository, None if input else config, **named, split=split, streaming=streaming and not input, revision=None if input else revision)
        except Exception as error:  # the hub's client has many, and what matters to the user is the same
            raise ValueError(f"{input or repository}, split '{split}', cannot be read ({type(error).__name__}: "
                             f'{str(error).strip().splitlines()[0]}); --input=FOLDER takes a local copy') from None
        total = len(rows) if hasattr(rows, '__len__') else (rows.info.splits or {}).get(split) and rows.info.splits[split].num_examples
        if validation_last and not (total or 0) > validation_last:
            raise ValueError(f'{input or repository}: the last {validation_last} documents are validation, but there are {total or "?"} '
                             'in all' + ('' if total else '; --streaming=False counts them'))
        for i, row in enumerate(rows):
            if not isinstance(row.get(column), str):
                raise ValueError(f"{input or repository}: row {i} of '{split}' has no text in its column '{column}'")
            where = splits[split] if isinstance(splits, dict) else split if len(splits) > 1 else None if not validation_last else 'validation' if i >= total - validation_last else 'train'
            if keep is None or keep(row):
                yield where, row[column], True, total


# what undoes the splitting of words from punctuation in a benchmark's text, (pattern, replacement) in this order, by the beginning of its name
CLEAN_UP = {
    'wikitext': [("s '", "s'"), (r"/' [0-9]/", "/'[0-9]/"), (' @-@ ', '-'), (' @,@ ', ','), (r' @\.@ ', '.'), (' : ', ': '), (' ; ', '; '), (r' \. ', '. '),
                 (' ! ', '! '), (r' \? ', '? '), (' , ', ', '), (r'\(\s*([^\)]*?)\s*\)', r'(\1)'), (r'\[\s*([^\]]*?)\s*\]', r'[\1]'),
                 (r'{\s*([^}]*?)\s*}', r'{\1}'), (r'"\s*([^"]*?)\s*"', r'"\1"'), (r"'\s*([^']*?)\s*'", r"'\1'"), ('= = = =', '===='), ('= = =', '==='),
                 ('= =', '=='), (' \u00b0 ', '\u00b0'), (' \n', '\n'), ('\n ', '\n'), (' N ', ' 1 '), (" 's", "'s")],
    'ptb': [(" 's", "'s"), ("s ' ", "s' "), (" n't", "n't"), (' \n ', '\n'), (r'\\/', '/'), (' N(?= )', ' 1'), (r'\$ 1', '$1'), ('# 1', '#1'), ('<unk>', '?')],
    'lm1b': [(r'(https?) : / / ', r'\1://'), (r" '(\w+)", r"'\1"), (r' (\w+) \. ', r' \1. '), (r' (\w+) \.$', r' \1.'), (r' ([?!])( |$)', r'\1\2'),
             (r' ([,:;]) ', r'\1 '), (' / ', '/'), (r'" ([^"]+) "', r'"\1"'), (r"' ([^']+) '", r"'\1'"), (r'\( ([^()]+) \)', r'(\1)'),
             (r'\[ ([^\[\]]+) \]', r'[\1]'), (r'([$£]) ', r'\1')],
    'lambada': [('[\u201c\u201d]', '"'), (r'\s+\Z', ''), (r'\A\s*', '\n')],
}
CLEAN_UP['scientific_papers'] = CLEAN_UP['wikitext'] + CLEAN_UP['lm1b']


def detokenize(dataset_name, text):
    """Undo the word-splitting of a benchmark's text, as MDLM's release does; text of other datasets is returned as it is."""
    for pattern, replacement in next((rules for name, rules in CLEAN_UP.items() if dataset_name.startswith(name)), ()):
        text = re.sub(pattern, replacement, text)
    return text


DATASETS = {
    'stdlib': read_stdlib,
    'openwebtext': partial(read_hub, 'Skylion007/openwebtext', validation_last=100_000),                         # as MDLM splits it
    'owt-gpt2-1024-split': partial(read_hub, 'dhruveshpatel/owt-gpt2-1024-split', splits=('train', 'validation')),  # xlm's
    'slimpajama': partial(read_hub, 'cerebras/SlimPajama-627B', splits=('train', 'validation'),                     # SMDM's, without code
                          keep=lambda row: (row.get('meta') or {}).get('redpajama_set_name') != 'RedPajamaGithub'),
    # the benchmarks of MDLM's tables 2 and 3; a document is a row of the hub
    'ptb': partial(read_hub, 'ptb-text-only/ptb_text_only', splits=('train', 'validation', 'test'), column='sentence', revision='refs/convert/parquet'),
    'wikitext2': partial(read_hub, 'Salesforce/wikitext', splits=('train', 'validation', 'test'), config='wikitext-2-raw-v1'),
    'wikitext103': partial(read_hub, 'Salesforce/wikitext', splits=('train', 'validation', 'test'), config='wikitext-103-raw-v1'),
    'lm1b': partial(read_hub, 'billion-word-benchmark/lm1b', splits=('train', 'test'), revision='refs/convert/parquet'),
    'lambada': partial(read_hub, 'EleutherAI/lambada_openai', splits={'test': 'validation'}, config='default'),    # all there is, MDLM's validation
    'ag_news': partial(read_hub, 'fancyzhx/ag_news', splits=('train', 'test')),
    'scientific_papers_pubmed': partial(read_hub, 'armanc/scientific_papers', splits=('validation', 'test'), column='article', files='pubmed/*{split}/*.parquet',
                                        revision='refs/convert/parquet'),
    'scientific_papers_arxiv': partial(read_hub, 'armanc/scientific_papers', splits=('validation', 'test'), column='article', files='arxiv/*{split}/*.parquet',
                                        revision='refs/convert/parquet'),
    'text8': read_text8,
    'text8-crop': read_text8,  # the same; in MDLM's release its training rows are cut at random places
}
# the split that MDLM measures each benchmark on
BENCHMARKS = dict(ptb='validation', wikitext2='validation', wikitext103='validation', lm1b='test', lambada='validation', ag_news='test',
                  scientific_papers_pubmed='validation', scientific_papers_arxiv='validation') | {'text8': 'test', 'text8-crop': 'test'}


def documents(dataset, input=None, streaming=True):
    """(split, text, last, total) of every document of a dataset, or piece of one (see above); 5% go to validation by a hash of their
    index where the source does not say."""
    if input and (dataset.startswith('text:') or dataset == 'stdlib'):
        raise ValueError(f'--input={input} takes the place of the hub: dataset {dataset} is read from this machine anyway')
    if dataset.startswith('text:'):
        reader = read_files(dataset[5:])
    elif dataset not in DATASETS:
        near = difflib.get_close_matches(dataset, DATASETS, n=1, cutoff=0)[0]
        raise ValueError(f"dataset '{dataset}' is not known; the nearest is '{near}', and text:PATH takes your own text")
    elif input and os.path.isfile(input) and dataset in BENCHMARKS and not dataset.startswith('text8'):  # rows like those of the hub, of its split
        column = DATASETS[dataset].keywords.get('column', 'text')
        lines = partial(read_lines, keep_newline=dataset.startswith('wikitext'))
        reader = ((BENCHMARKS[dataset], *row[1:]) for row in read_files(input, lines, column))
    elif input and input.endswith(('.txt', '.jsonl')) and not dataset.startswith('text8'):
        reader = read_files(input)
    else:
        reader = DATASETS[dataset](input=input, streaming=streaming)
    first, place, drawn = 0, 0, []
    for split, text, last, total in reader:
        text = detokenize(dataset, text) if dataset in DATASETS else text
        if split is None:
            if place == len(drawn):                  # 2^16 documents at a time
                index = np.arange(2 ** 16, dtype=np.uint64) + np.uint64(first)
                place, first, drawn = 0, first + 2 ** 16, ((splitmix64(index) >> np.uint64(1)) % np.uint64(20)).tolist()
            split, place = 'train' if drawn[place] else 'validation', place + last
        yield split, text, last, total


# -----------------------------------------------------------------------------
# documents -> data/<name>


def default_name(dataset, tokenizer):
    parts = [os.path.splitext(os.path.basename(part.removeprefix('text:').rstrip('/')))[0] for part in (dataset, tokenizer)]
    return '-'.join(re.sub(r'[^\w.-]+', '_', part) for part in parts)


def command_for(dataset, tokenizer, name=None, input=None):
    """The command that makes a data folder."""
    arguments = dict(dataset=dataset, tokenizer=tokenizer, name=name, input=input)
    return 'python data.py ' + ' '.join(f'--{key}={shlex.quote(value)}' for key, value in arguments.items() if value)


def source_size(dataset, input=None):
    """Bytes of the local files a dataset is read from, None where it is not read from local files."""
    path = input or (dataset[5:] if dataset.startswith('text:') else None)
    if path is None or not os.path.exists(path):
        return None
    files = [path] if os.path.isfile(path) else [os.path.join(where, file) for where, _, files in os.walk(path) for file in files]
    return sum(os.path.getsize(file) for file in files)


def read_meta(folder):
    """meta.json of a data folder whose files agree with it. Raises FileNotFoundError where there is none, ValueError with the command
    that rebuilds the folder where a file is missing, truncated, or not what the meta says."""
    path = os.path.join(folder, 'meta.json')
    if not os.path.isfile(path):
        raise FileNotFoundError(f'{path} is missing: {folder} is not a data folder; make one with python data.py --dataset=NAME')
    try:
        with open(path) as f:
            meta = json.load(f)
        rebuild, itemsize = meta['command'], {'uint16': 2, 'uint32': 4}[meta['dtype']]
        if not all(type(meta['tokenizer'][key]) is int for key in ('vocab_size', 'eos_id', 'bos_id', 'pad_id', 'mask_id')):
            raise TypeError('the ids of the tokenizer are not whole numbers')
        for split, counts in meta['splits'].items():
            for ending, size in (('bin', counts['tokens'] * itemsize), ('idx', (counts['documents'] + 1) * 8)):
                file = os.path.join(folder, f'{split}.{ending}')
                found = os.path.getsize(file) if os.path.isfile(file) else None
                if found != size:
                    found = 'is missing' if found is None else f'holds {found:,} bytes'
                    raise ValueError(f'{file} {found}, where meta.json says {size:,}: rebuild it with {rebuild}')
            offsets = np.memmap(os.path.join(folder, f'{split}.idx'), dtype='<i8', mode='r')
            if offsets[0] != 0 or offsets[-1] != counts['tokens']:
                raise ValueError(f'{folder}/{split}.idx ends at {offsets[-1]:,}, where meta.json says {counts["tokens"]:,} tokens: '
                                 f'rebuild it with {rebuild}')
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f'{path} is not what data.py writes ({type(error).__name__}: {error}): remove {folder} and prepare it again') from None
    return meta


def encode_chunk(tok, dtype, chunk):
    """Texts per split, and which of them end a document -> per split: the ids of all, each document closed by EOS, where documents end,
    the number of bytes."""
    encoded = {}
    for split, (texts, last) in chunk.items():
        ids, ends = tok.encode_batch(texts)
        ends = ends[np.array(last)]
        encoded[split] = dict(ids=np.insert(ids.astype(dtype), ends, tok.eos_id), ends=ends + np.arange(1, len(ends) + 1), bytes=len(''.join(texts).encode()))
    return encoded


def in_order(function, items, workers):
    """map(function, items) on threads, in order, with a bounded number of items under way. Tokenizers work outside the interpreter's
    lock, so that threads use every core."""
    with ThreadPoolExecutor(workers) as pool:
        pending = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def training_texts(documents, limit=2 ** 27):
    """The first characters of the training split, enough for a tokenizer."""
    for split, text, *_ in documents:
        if split == 'train':
            yield text
            limit -= len(text)
            if limit < 0:
                return


def chunks(documents, progress):
    """About a megabyte of documents at a time: per split, the texts and which of them end a document."""
    chunk, size, total = {}, 0, None
    for split, text, last, total in documents:
        texts, ends = chunk.setdefault(split, ([], []))
        texts.append(text)
        ends.append(last)
        size += len(text)
        if size >= PIECE:
            progress.total = progress.total or total
            yield chunk
            chunk, size = {}, 0
    progress.total = progress.total or total
    yield chunk


def write_bins(folder, tok, documents, size=None, name=''):
    """<split>.bin and <split>.idx of all documents; returns the dtype and the counts per split. size: bytes of the source, for the bar."""
    dtype = np.dtype('<u2' if tok.vocab_size <= 2 ** 16 else '<u4')
    workers, files, counts, tokens, start = os.cpu_count(), {}, {}, 0, time.time()
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(tqdm(desc=f'tokenizing {name}', total=size, unit='B' if size else ' documents', unit_scale=True, mininterval=0.5))
        for encoded in in_order(partial(encode_chunk, tok, dtype), chunks(documents, progress), workers):
            for split, part in encoded.items():
                if split not in files:
                    files[split] = [stack.enter_context(open(os.path.join(folder, f'{split}.{ending}'), 'wb')) for ending in ('bin', 'idx')]
                    files[split][1].write(np.zeros(1, dtype='<i8').tobytes())
                    counts[split] = dict(documents=0, tokens=0, bytes=0)
                files[split][0].write(part['ids'].tobytes())
                files[split][1].write((counts[split]['tokens'] + part['ends']).astype('<i8').tobytes())
                for key, n in (('documents', len(part['ends'])), ('tokens', len(part['ids'])), ('bytes', part['bytes'])):
                    counts[split][key] += n
                tokens += len(part['ids'])
                progress.update(part['bytes'] if size else len(part['ends']))
            progress.set_postfix_str(f'{tokens / (time.time() - start):,.0f} tokens/s', refresh=False)
    return dtype.name, counts


def prepare(dataset, tokenizer='gpt2', name=None, input=None, streaming=True):
    """Make data/<name> if it is not there, and return its path. It appears whole or not at all; processes that ask for it at the same
    time wait for the one that makes it. Raises ValueError where the folder was made from another source or tokenizer."""
    name = default_name(dataset, tokenizer) if name is None else str(name)
    if not re.fullmatch(r'[\w-][\w.-]*', name):
        raise ValueError(f"name='{name}': the name of a folder in data/ is made of letters, digits, '_', '-' and '.'")
    folder, unfinished = os.path.join('data', name), os.path.join('data', f'.{name}.unfinished')
    os.makedirs('data', exist_ok=True)
    with FileLock(os.path.join('data', f'.{name}.lock')):
        source = dict(dataset=dataset, input=input, size=source_size(dataset, input))
        if os.path.exists(folder):
            try:
                meta = read_meta(folder)
            except ValueError as error:
                print(f'{error}\nrebuilding {folder}', file=sys.stderr)
            else:
                if source['size'] is None:  # the text itself may be gone by now
                    source['size'] = meta['source']['size']
                if meta['source'] != source or meta['tokenizer']['name'] != tokenizer:
                    raise ValueError(f"{folder} was made from {meta['source']} with tokenizer '{meta['tokenizer']['name']}', not from {source} "
                                     f"with '{tokenizer}': give another --name, or remove the folder")
                return folder
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            os.makedirs(unfinished)
            if re.fullmatch(r'bpe-\d{1,7}', tokenizer):
                print(f'training the tokenizer {tokenizer} on {dataset}', flush=True)
                train_bpe(training_texts(documents(dataset, input, streaming)), int(tokenizer[4:]), os.path.join(unfinished, 'tokenizer.json'))
            tok = get_tokenizer(tokenizer, unfinished)
            dtype, counts = write_bins(unfinished, tok, documents(dataset, input, streaming), source['size'], name)
            if not counts:
                raise ValueError(f'{input or dataset} holds no document')
            meta = dict(source=source, command=command_for(dataset, tokenizer, name, input), tokenizer=tok.meta(), dtype=dtype, splits=counts)
            with open(os.path.join(unfinished, 'meta.json'), 'w') as f:
                json.dump(meta, f, indent=1)
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def find_or_prepare(dataset, tokenizer):
    """The data folder that `dataset` means to train.py and eval.py: data/<dataset>, or the one made from the dataset of that name with
    that tokenizer; what is read from this machine alone is prepared now. Raises FileNotFoundError with the command that makes it."""
    dataset = str(dataset)
    folder = os.path.join('data', dataset)
    if not os.path.isfile(os.path.join(folder, 'meta.json')):
        folder = os.path.join('data', default_name(dataset, tokenizer))
        if dataset == 'stdlib' or dataset.startswith('text:'):
            prepare(dataset, tokenizer)
        elif not os.path.isdir(folder):
            known = f'make it with {command_for(dataset, tokenizer)}' if dataset in DATASETS else f"and '{dataset}' is none of " + ', '.join(DATASETS)
            raise FileNotFoundError(f'there is no data in {folder}: {known}')
    meta = read_meta(folder)
    if meta['tokenizer']['name'] != tokenizer:
        raise ValueError(f"{folder} holds ids of the tokenizer '{meta['tokenizer']['name']}', not '{tokenizer}': "
                         f"give --tokenizer={meta['tokenizer']['name']}, or other data")
    return folder


# -----------------------------------------------------------------------------
# rows of a batch


def pack_wrap(docs, block_size, bos_id, eos_id):
    """Rows as MDLM packs them: docs (lists of ids without EOS) are closed with EOS each and joined; a row is BOS, the next
    block_size - 2 ids, EOS; the remainder is dropped. -> (n, block_size) int64."""
    stream = np.array([i for doc in docs for i in [*doc, eos_id]], dtype=np.int64)
    return wrap(stream, np.arange(len(stream) // (block_size - 2)), block_size, bos_id, eos_id)


def wrap(stream, indices, block_size, bos_id, eos_id):
    x0 = np.empty((len(indices), block_size), dtype=np.int64)
    x0[:, 0], x0[:, -1] = bos_id, eos_id
    for row, i in zip(x0, indices):
        row[1:-1] = stream[i * (block_size - 2):(i + 1) * (block_size - 2)]
    return x0


class TokenRows:
    """The rows of a split: rows[indices] -> dict of x0 (n, L) int64 and, (n, L) bool each, maskable (may be corrupted), scored (counts in
    the loss), document (is a token of the text or an EOS of it, not one that the packing added) and attended (may be looked at).

    packing: 'wrap': BOS, the next L-2 tokens of the stream, EOS. 'concat': the next L tokens. 'pad': one document and its EOS, cut to L,
    padded on the right; padding is a token like any other, or with loss_on_padding=False neither masked, attended nor scored.
    'sentence': BOS ([CLS]), one document cut to L-2, EOS ([SEP]), padding, which is corrupted and attended but not scored.
    Raises what read_meta raises, and ValueError where the split is missing or shorter than a row."""

    def __init__(self, folder, split, block_size, packing, loss_on_padding=True):
        self.meta = meta = read_meta(folder)
        self.name, self.block_size, self.packing, self.loss_on_padding = f'{folder}/{split}', block_size, packing, loss_on_padding
        if packing not in ('wrap', 'concat', 'pad', 'sentence'):
            raise ValueError(f"packing '{packing}' is not known: choose from wrap, concat, pad, sentence")
        if block_size < (3 if packing in ('wrap', 'sentence') else 1):
            raise ValueError(f"block_size={block_size} is too short for packing '{packing}'")
        if split not in meta['splits']:
            raise ValueError(f"{folder} has no split '{split}', only {', '.join(meta['splits'])} (--val_split of train.py, --split of eval.py): 5% of the documents are validation where the source has "
                             'none, and a very short text may leave none for it')
        self.counts = meta['splits'][split]
        # as plain arrays, whose slices take a tenth of the time
        self.tokens = np.asarray(np.memmap(os.path.join(folder, f'{split}.bin'), dtype=np.dtype(meta['dtype']).newbyteorder('<'), mode='r'))
        self.offsets = np.asarray(np.memmap(os.path.join(folder, f'{split}.idx'), dtype='<i8', mode='r'))
        self.length = {'wrap': lambda: len(self.tokens) // (block_size - 2), 'concat': lambda: len(self.tokens) // block_size,
                       'pad': lambda: self.counts['documents'], 'sentence': lambda: self.counts['documents']}[packing]()
        if self.length == 0:
            raise ValueError(f"{folder}/{split}.bin holds {len(self.tokens)} tokens, less than one row of {block_size}: "
                             'prepare more text, or lower block_size')

    def __len__(self):
        return self.length

    def __getitem__(self, indices):
        indices = np.arange(*indices.indices(len(self))) if isinstance(indices, slice) else np.atleast_1d(np.asarray(indices))
        if len(indices) and not (0 <= indices.min() and indices.max() < len(self)):
            raise IndexError(f'row {indices.min() if indices.min() < 0 else indices.max()} of {len(self)}')
        tok, L = self.meta['tokenizer'], self.block_size
        document = np.ones((len(indices), L), dtype=bool)
        if self.packing == 'wrap':
            x0 = wrap(self.tokens, indices, L, tok['bos_id'], tok['eos_id'])
            document[:, [0, -1]] = False
        elif self.packing == 'concat':
            x0 = np.stack([self.tokens[i * L:(i + 1) * L] for i in indices]).astype(np.int64)
        else:
            x0 = np.full((len(indices), L), tok['pad_id'], dtype=np.int64)
            padding = np.ones_like(document)
            for row, known, pad, i in zip(x0, document, padding, indices):
                if not 0 <= self.offsets[i] < self.offsets[i + 1] <= len(self.tokens):
                    raise ValueError(f"the offsets of {self.name} do not rise at document {i}: rebuild them with {self.meta['command']}")
                ids = self.tokens[self.offsets[i]:min(self.offsets[i + 1], self.offsets[i] + L)]
                if self.packing == 'sentence':  # the document's own EOS closes it, wherever it is cut
                    ids = np.concatenate(([tok['bos_id']], ids[:-1][:L - 2] if len(ids) < L else ids[:L - 2], [tok['eos_id']]))
                    known[0] = False
                row[:len(ids)], known[len(ids):], pad[:len(ids)] = ids, False, False
        if len(x0) and x0.max() >= tok['vocab_size']:
            raise ValueError(f"the bin of {self.name} holds the id {x0.max()}, outside of the {tok['vocab_size']:,} ids of its tokenizer: rebuild it with {self.meta['command']}")
        x0, document, everything = torch.from_numpy(x0), torch.from_numpy(document), torch.ones(x0.shape, dtype=torch.bool)
        if self.packing == 'sentence':
            return dict(x0=x0, maskable=everything, scored=~torch.from_numpy(padding), document=document, attended=everything)
        attended = document if self.packing == 'pad' and not self.loss_on_padding else everything
        return dict(x0=x0, maskable=attended, scored=attended, document=document, attended=attended)


# -----------------------------------------------------------------------------

if __name__ == '__main__':
    from configurator import configure
    configure(globals())
    folder = prepare(dataset, tokenizer, name, input, streaming)
    meta = read_meta(folder)
    print(f"{folder}: tokenizer {meta['tokenizer']['name']}, {meta['tokenizer']['vocab_size']:,} ids with the mask, {meta['dtype']}")
    for split, counts in meta['splits'].items():
        print(f"  {split}: {counts['documents']:,} documents, {counts['tokens']:,} tokens, {counts['bytes']:,} bytes")

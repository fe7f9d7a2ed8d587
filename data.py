"""
Text -> token bins -> rows of a batch.

    python data.py --dataset=stdlib --tokenizer=bpe-2048
    python data.py --dataset=text:corpus.txt --name=corpus --tokenizer=gpt2
    python data.py --dataset=openwebtext
    python data.py --dataset=pairs:questions.jsonl --tokenizer=gpt2    # fields "prompt", "answer"

data/<name>/ then holds meta.json and, for each split, <split>.bin (token ids, each document closed
by EOS) and <split>.idx (int64 offsets of the documents and of the end); of prompts and answers also
<split>.prompt (int64, how many tokens of each document are its prompt). TokenRows cuts out rows.
"""
from configurator import configure, defaults_of, require  # first: it answers Ctrl-C

import ast
import bisect
import contextlib
import difflib
import functools
import hashlib
import inspect
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import sys
import sysconfig
import threading
from array import array
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import PurePath

import numpy as np
import torch
from filelock import FileLock
from tqdm import tqdm

dataset = 'stdlib'  # a key of DATASETS, or text:PATH or pairs:PATH (a file, or a folder of them)
tokenizer = 'gpt2'  # gpt2, gpt2-xlm, bert-xlm, bytes, text8, bpe-N, a hub name, or a run's folder
name = None         # the bins go to data/<name>; None: <dataset>-<tokenizer>
input = None        # a local file or folder of the same form, in place of the hub's
streaming = True    # hub datasets: read while they download; False: download first
reader_options = None  # [dict] the dataset's own; --clues=28 sets one
max_length = None   # [int > 1] prompts and answers of more tokens are left out; None: as released

# -----------------------------------------------------------------------------
# random numbers: functions of integer keys, never of a generator's state

MASK64 = 2 ** 64 - 1


def splitmix64(x):
    """A 64-bit hash (Steele et al. 2014) of an integer below 2^64, or of a uint64 array."""
    x = (x + 0x9E3779B97F4A7C15) & MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def key_of(*numbers):
    """One seed of 63 bits, which every generator takes, from several integers modulo 2^64, such as
    (seed, step, micro-batch)."""
    key = 0
    for number in numbers:
        key = splitmix64(key ^ (int(number) & MASK64))
    return key >> 1


def permute(index, n, *key):
    """index (k,) under the permutation of range(n) that key decides: a Feistel network on the next
    power of four, walked until the image lies in the range."""
    half = math.ceil((n - 1).bit_length() / 2) or 1
    low = 2 ** half - 1
    round_keys = [key_of(*key, i) for i in range(6)]
    image = np.array(index, dtype=np.uint64)
    outside = np.ones(len(image), dtype=bool)
    while outside.any():
        left = image[outside] >> half
        right = image[outside] & low
        for round_key in round_keys:
            left, right = right, left ^ (splitmix64(right ^ round_key) & low)
        image[outside] = left << half | right
        outside = image >= n
    return image.astype(np.int64)


# -----------------------------------------------------------------------------
# tokenizers


class Tokenizer:
    """encode(str) -> ids, decode(ids) -> str, and the special ids, which no text is encoded to.

    encode_batch: texts -> ids, ends (one_after_the_other). decode_ids: ids below base_size -> str.
    named: (id, text) of further ids. A missing EOS, then a missing mask, gets the next id; missing
    BOS and padding are EOS. sha256: of the file of a tokenizer trained here."""

    def __init__(self, name, encode_batch, decode_ids, base_size, eos_id=None, bos_id=None,
                 pad_id=None, mask_id=None, named=(), sha256=None, special_ids=()):
        self.name = name
        self.encode_batch = encode_batch
        self.decode_ids = decode_ids
        self.named = dict(named)
        self.sha256 = sha256
        self.vocab_size = base_size + len(self.named)
        self.eos_id = self.add('<|endoftext|>') if eos_id is None else eos_id
        self.mask_id = self.add('<|mask|>') if mask_id is None else mask_id
        self.bos_id = self.eos_id if bos_id is None else bos_id
        self.pad_id = self.eos_id if pad_id is None else pad_id
        ours = self.bos_id, self.eos_id, self.pad_id, self.mask_id
        self.special_ids = {*special_ids, *self.named, *ours}

    def add(self, text):
        self.named[self.vocab_size] = text
        self.vocab_size += 1
        return self.vocab_size - 1

    def encode(self, text):
        return self.encode_batch([text])[0].tolist()

    def decode(self, ids):
        parts = []
        for special, group in itertools.groupby(map(int, ids), self.named.__contains__):
            ids = list(group)
            parts += map(self.named.get, ids) if special else [self.decode_ids(ids)]
        return ''.join(parts)

    def meta(self):
        keys = ('name', 'vocab_size', 'eos_id', 'bos_id', 'pad_id', 'mask_id', 'sha256')
        return {key: getattr(self, key) for key in keys}


def one_after_the_other(sequences):
    """Sequences of ids -> all ids in one array, and where each sequence ends."""
    arrays = [np.zeros(0, dtype=np.int64)]
    arrays += [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
    return np.concatenate(arrays), np.cumsum([len(array) for array in arrays[1:]], dtype=np.int64)


GPT2_XLM = ('<|cls|>', '<|bos|>', '<|pad|>', '<|unk|>', '<|mask|>', '<|sep|>')  # ids from 50257


def gpt2_tokenizer(name):
    import tiktoken
    try:
        base = tiktoken.get_encoding('gpt2')
    except Exception as error:  # requests' own, where there is no network
        raise ValueError("GPT-2's vocabulary cannot be downloaded: set TIKTOKEN_CACHE_DIR to a "
                         f'folder with it ({type(error).__name__})') from None

    @functools.cache  # a tenth faster: the first thread that runs its regular expressions owns them
    def encoder(thread):
        return tiktoken.Encoding(
            'gpt2', pat_str=base._pat_str, mergeable_ranks=base._mergeable_ranks,
            special_tokens=base._special_tokens)

    def encode_batch(texts):
        ours = encoder(threading.get_ident())
        joined = '<|endoftext|>'.join(texts)
        if joined.count('<|endoftext|>') >= len(texts):  # a text holds these letters itself
            return one_after_the_other(map(ours.encode_ordinary, texts))
        ids = ours.encode_to_numpy(joined, allowed_special='all')
        eos = np.flatnonzero(ids == 50256)
        return np.delete(ids, eos), np.append(eos, len(ids)) - np.arange(len(eos) + 1)

    special = {}
    if name == 'gpt2-xlm':
        named = enumerate(GPT2_XLM, 50257)
        special = dict(bos_id=50258, pad_id=50259, mask_id=50261, named=named)
    return Tokenizer(name, encode_batch, base.decode, 50257, eos_id=50256, **special)


def bpe_tokenizer(name, folder):
    import tokenizers
    path = f'{folder or "."}/tokenizer.json'
    if not os.path.isfile(path):
        raise FileNotFoundError(f'{path} is missing: data.py trains {name} and saves it there')
    with open(path, 'rb') as f:
        file = f.read()
    try:
        base = tokenizers.Tokenizer.from_buffer(file)
    except Exception as error:  # tokenizers' own
        raise ValueError(f'{path} is not a tokenizer ({error}): prepare the data again') from None
    base.encode_special_tokens = True  # as text

    def encode_batch(texts):
        encodings = base.encode_batch(texts, add_special_tokens=False)
        return one_after_the_other(encoding.ids for encoding in encodings)

    return Tokenizer(
        name, encode_batch, partial(base.decode, skip_special_tokens=False), base.get_vocab_size(),
        eos_id=base.token_to_id('<|endoftext|>'), sha256=hashlib.sha256(file).hexdigest())


def train_bpe(texts, size, path):
    """Train a byte-level BPE of `size` ids, EOS included, on an iterator of texts; save it."""
    import tokenizers
    require(size > 256, f'bpe-{size}: a byte-level BPE has at least 257 ids, 256 bytes and EOS')
    base = tokenizers.Tokenizer(tokenizers.models.BPE())
    base.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    base.decoder = tokenizers.decoders.ByteLevel()
    base.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=['<|endoftext|>'], show_progress=False,
        initial_alphabet=sorted(base.pre_tokenizer.alphabet())))
    base.save(path)


def hugging_face_tokenizer(name):
    import transformers
    try:
        base = transformers.AutoTokenizer.from_pretrained(
            name, split_special_tokens=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        known = ', '.join([*TOKENIZERS, 'bpe-N'])
        raise ValueError(
            f"tokenizer '{name}' is neither {known} nor one of Hugging Face ({why})") from None

    def encode_batch(texts):
        options = dict(add_special_tokens=False, return_attention_mask=False, verbose=False)
        return one_after_the_other(base(texts, **options)['input_ids'])

    return Tokenizer(
        name, encode_batch, base.decode, len(base),
        eos_id=base.sep_token_id if base.eos_token_id is None else base.eos_token_id,
        bos_id=base.cls_token_id if base.bos_token_id is None else base.bos_token_id,
        pad_id=base.pad_token_id, mask_id=base.mask_token_id, special_ids=base.all_special_ids)


def bert_xlm_tokenizer(name):
    """BERT's word pieces and, after them, xlm's [BOS] and [EOS]."""
    tok = hugging_face_tokenizer('bert-base-uncased')
    n = tok.vocab_size
    return Tokenizer(
        name, tok.encode_batch, tok.decode_ids, n, eos_id=n + 1, bos_id=n, pad_id=tok.pad_id,
        mask_id=tok.mask_id, named={n: '[BOS]', n + 1: '[EOS]'})


def bytes_tokenizer(name):
    def encode_batch(texts):
        return one_after_the_other(np.frombuffer(text.encode(), np.uint8) for text in texts)

    def decode_ids(ids):
        return bytes(ids).decode(errors='replace')

    return Tokenizer(name, encode_batch, decode_ids, 256)


def text8_tokenizer(name):
    """35 ids: eight special ones, the letters a to z, and the space."""
    special = '[CLS] [SEP] [BOS] [EOS] [MASK] [PAD] [RESERVED] [UNK]'.split()
    letters = 'abcdefghijklmnopqrstuvwxyz '
    ids_of_bytes = bytes(8 + letters.find(chr(byte)) for byte in range(256))  # not found: 7, [UNK]

    def encode_batch(texts):
        found = (text.encode('latin-1', 'replace').translate(ids_of_bytes) for text in texts)
        return one_after_the_other(np.frombuffer(ids, np.uint8) for ids in found)

    def decode_ids(ids):
        return ''.join(letters[i - 8] for i in ids)

    return Tokenizer(
        name, encode_batch, decode_ids, 27, eos_id=3, bos_id=2, pad_id=5, mask_id=4,
        named=enumerate(special))


TOKENIZERS = {
    'gpt2': gpt2_tokenizer,
    'gpt2-xlm': gpt2_tokenizer,
    'bert-xlm': bert_xlm_tokenizer,
    'bytes': bytes_tokenizer,
    'text8': text8_tokenizer,
}


def is_bpe(name):
    return re.fullmatch(r'bpe-\d{1,7}', name)


def is_run(name):
    """Whether it is the folder of a run of train.py, or of data."""
    files = ('ckpt.pt', 'meta.json')
    return name not in TOKENIZERS and any(os.path.isfile(f'{name}/{file}') for file in files)


def tokenizer_of_run(folder):
    path = f'{folder}/ckpt.pt'
    if not os.path.isfile(path):
        return get_tokenizer(read_meta(folder)['tokenizer']['name'], folder)
    try:
        meta = torch.load(path, mmap=True, weights_only=True)['tokenizer']
        name = meta['name']
    except Exception as error:  # whatever a broken file leads to
        raise ValueError(f'{path} does not tell its tokenizer ({type(error).__name__}): give '
                         '--tokenizer by its name') from None
    return get_tokenizer(name, folder, meta)


def get_tokenizer(name, folder=None, meta=None):
    """The tokenizer of that name: a key of TOKENIZERS, 'bpe-N' (from folder/tokenizer.json), the
    folder of a run or of data, or a Hugging Face name or folder. meta: of the tokenizer that a net
    was trained with, which must have the same ids. Raises ValueError or FileNotFoundError."""
    if is_bpe(name):
        tok = bpe_tokenizer(name, folder)
    elif is_run(name):
        tok = tokenizer_of_run(name)
    else:
        tok = TOKENIZERS.get(name, hugging_face_tokenizer)(name)
    for key, theirs in (meta or {}).items():
        ours = tok.meta().get(key, theirs)
        where = f' in {folder}' if key == 'sha256' else ''
        require(key == 'name' or theirs in (None, ours),  # None: an old checkpoint
                f"the tokenizer '{name}'{where} has {key}={ours}, the net was trained with "
                f'{key}={theirs}: give its own')
    return tok


# -----------------------------------------------------------------------------
# sources of text. A reader yields (split, text, last, total). split: None where a hash chooses.
# text: a document, or a piece of one with last=False where more of it follows, or an example: a
# list of (parts of the prompt, parts of the answer), a document each, [] where the source is
# malformed. total: the number of documents, if it is known

TEXT_FILES = ('.txt', '.jsonl')
PIECE = 1 << 20  # characters; longer documents go through in pieces
BLANK = re.compile(r'\n(?:[^\S\n]*\n)+')  # lines of nothing but white space
CUT = re.compile(r'\S(?=\s\S)')  # between two words, where GPT-2's pattern cuts too


def read_plain_text(path):
    """The documents of a text file of any size, which blank lines separate."""
    rest = ''       # has been read, and is not yet yielded
    inside = False  # its document has begun in an earlier piece
    with open(path, encoding='utf-8-sig') as f:
        for block in itertools.chain(iter(partial(f.read, PIECE), ''), ['\n\n']):
            before = '' if inside else '\n\n'  # so that BLANK takes what is blank at its beginning
            *whole, rest = BLANK.split(before + rest + block)
            for text in whole:
                if text or inside:
                    yield None, text, True, None
                inside = False
            cut = CUT.search(rest, PIECE) if len(rest) > 2 * PIECE else None
            if cut:
                yield None, rest[:cut.end()], False, None
                rest = rest[cut.end():]
                inside = True


def is_text(value):
    """A string without half a surrogate pair."""
    return isinstance(value, str) and value.encode(errors='ignore').decode() == value


def read_objects(path, *columns, otherwise=None):
    """The number of each line and the fields `columns` of its object, or its field `otherwise`."""
    with open(path, encoding='utf-8-sig') as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            row = row if isinstance(row, dict) else {}
            values = [row.get(column, row.get(otherwise)) for column in columns]
            for column, value in zip(columns, values, strict=True):
                require(is_text(value), f'{path}, line {number}: not a JSON object with a '
                        f'"{column}" field that holds a string')
            yield number, *values


def read_jsonl(path, column='text'):
    """Every line is an object with the text in its field `column`, or else in 'text'."""
    for _, text in read_objects(path, column, otherwise='text'):
        yield None, text, True, None


def read_lines(path, keep_newline=False):
    """Every line is a document, an empty one too."""
    with open(path, encoding='utf-8-sig', newline='\n') as f:
        for line in f:
            text = line.strip()
            yield None, line if text and keep_newline else text, True, None


def files_of(path, endings=TEXT_FILES):
    """The file itself, or those of a folder that end so, in the order of their paths."""
    files = [path]
    if os.path.isdir(path):
        files = [os.path.join(parent, file) for parent, _, names in os.walk(path) for file in names]
        files = sorted(file for file in files if file.endswith(endings))
    if not files:
        raise FileNotFoundError(f'{path} is a folder without {" or ".join(endings)} files')
    for file in files:
        if not os.path.exists(file):
            link = 'a link to a file that is ' if os.path.islink(file) else ''
            raise FileNotFoundError(f'{file} is {link}not there')
    return files


def read_files(path, read_text=read_plain_text, read_json=read_jsonl):
    """A text file, a .jsonl file, or a folder of them."""
    for file in files_of(path):
        try:
            yield from read_json(file) if file.endswith('.jsonl') else read_text(file)
        except UnicodeDecodeError as error:
            raise ValueError(f'{file} is not UTF-8 text ({error.reason})') from None


@functools.cache
def stdlib_documents():
    from pydoc_data.topics import topics
    documents = dict.fromkeys(topics[topic].strip() for topic in sorted(topics))
    left_out = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages'}
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for parent, folders, files in os.walk(sysconfig.get_path('stdlib')):
        folders[:] = sorted(set(folders) - left_out)
        for file in sorted(file for file in files if file.endswith('.py')):
            with open(os.path.join(parent, file), 'rb') as f:
                try:
                    tree = ast.parse(f.read())
                except (SyntaxError, ValueError):
                    continue  # a template or a broken file: no documentation in it
            for node in ast.walk(tree):
                if isinstance(node, documented):
                    documents[(ast.get_docstring(node) or '').strip()] = None
    documents.pop('', None)
    return list(documents)


def read_stdlib(input=None, streaming=True):
    """English that every CPython carries: the topics of its help() and the docstrings of the
    standard library, without tests and repetitions."""
    for text in stdlib_documents():
        yield None, text, True, len(stdlib_documents())


def read_text8(input=None, streaming=True, length=256):
    """text8 in documents of `length` characters, None: one a split. The first 90% are train, 5%
    validation, 5% test (Austin et al. 2021, appendix B.1). input: the file."""
    splits = ('train', 'validation', 'test')
    if input:
        with open(input, encoding='ascii', errors='replace') as f:
            whole = f.read().strip('\n')
        a, b = len(whole) * 90 // 100, len(whole) * 95 // 100
        parts = zip(splits, (whole[:a], whole[a:b], whole[b:]), strict=True)
    else:
        parts = (item[:2] for item in read_hub('afmck/text8', splits))
    for split, text in parts:
        if length is None:
            for i in range(0, len(text), PIECE):
                yield split, text[i:i + PIECE], i + PIECE >= len(text), None
            continue
        for i in range(0, len(text) - length + 1, length):
            yield split, text[i:i + length], True, None


def read_hub(repository, splits=None, validation_last=0, column='text', keep=None, benchmark=None,
             keep_newline=False, most=None, input=None, streaming=True, **options):
    """A Hugging Face dataset, or its local copy: a folder `input`, or a file.

    splits: those of the hub, or a dict from the hub's names to ours; None: a hash splits 'train'.
    validation_last: so many documents at the end of 'train' are validation. keep: a test of rows.
    benchmark: the split that is measured, and which a file holds, a row a line (keep_newline: with
    its newline). most: documents of a split. options: of load_rows."""
    read_text, read_json = read_plain_text, read_jsonl
    if benchmark:
        read_text = partial(read_lines, keep_newline=keep_newline)
        read_json = partial(read_jsonl, column=column)
    if input and (input.endswith(TEXT_FILES) or benchmark and os.path.isfile(input)):
        for _, *rest in read_files(input, read_text, read_json):
            yield benchmark, *rest
        return
    source = input or repository
    for split in splits or ['train']:
        rows = load_rows(repository, split, input, streaming, **options)
        info = (rows.info.splits or {}).get(split)
        total = len(rows) if hasattr(rows, '__len__') else getattr(info, 'num_examples', None)
        hint = f'there are {total} in all' if total else '--streaming=False counts them'
        require(not validation_last or total and total > validation_last,
                f'{source}: the last {validation_last} documents are validation, but {hint}')
        ours = split if splits or validation_last else None
        if isinstance(splits, dict):
            ours = splits[split]
        for i, row in enumerate(itertools.islice(rows, most)):
            text = row.get(column)
            require(isinstance(text, str),
                    f"{source}: row {i} of '{split}' has no text in its column '{column}'")
            if validation_last and i == total - validation_last:
                ours = 'validation'
            if keep is None or keep(row):
                yield ours, text, True, total


def load_rows(repository, split, input=None, streaming=True, data_files=None, **options):
    """The rows of a split. data_files: the pattern of its files. options: of load_dataset."""
    import datasets
    if data_files:
        options['data_files'] = {split: data_files.format(split=split)}
    try:
        if input:
            return datasets.load_dataset(input, split=split)
        return datasets.load_dataset(repository, split=split, streaming=streaming, **options)
    except Exception as error:  # the hub's client has many, which mean the same to the user
        why = f'{type(error).__name__}: {str(error).strip().splitlines()[0]}'
        raise ValueError(f"{input or repository}, split '{split}', cannot be read ({why}); "
                         '--input=FOLDER takes a local copy') from None


# prompts and answers; each part is tokenized apart


def read_pair_lines(path):
    for number, prompt, answer in read_objects(path, 'prompt', 'answer'):
        require(answer, f'{path}, line {number}: the answer is empty')
        yield 'train', [([prompt], [answer])], True, None


def read_pairs(paths):
    """Files, or folders of them. Of several, those whose name ends in 'test' or 'validation' are
    these splits."""
    files = [file for path in paths for file in files_of(path, ('.jsonl',))]
    for file in files:
        named = re.search(r'(?:^|[\W_])(test|validation)\.jsonl$', file)
        split = named[1] if named and len(files) > 1 else 'train'
        for _, *rest in read_files(file, read_pair_lines, read_pair_lines):
            yield split, *rest


def read_local(read, where, input=None, streaming=True):
    """A dataset that is one file, which is not read from the hub."""
    require(input, f'give --input=FILE: {where}')
    require(not os.path.isdir(input), f'{input} is a folder: give one file')
    yield from read_files(input, read, read)


def gsm8k_line(question, answer):
    """GSM8K's two fields as a line of the implicit chain-of-thought data (Deng et al. 2023): the
    question, the annotations of the answer, the number."""
    thought = ' '.join(re.findall('<<.*?>>', answer))
    return f"{question}||{thought} #### {answer.rpartition('####')[2].strip()}\n"


def gsm8k_example(line):
    """Two documents, as SMDM has them: the thought to the question, the number to both."""
    question, *rest = line.split('||')
    if len(rest) != 1 or rest[0].count('####') != 1:
        return []
    asked = 'Question: ' + question
    thought = 'Answer: ' + rest[0].split('####')[0]
    return [([asked], [thought]), ([asked, thought], ['####' + line.split('####')[1]])]


def read_gsm8k_lines(path):
    """Lines of that form, or GSM8K's own objects."""
    with open(path, encoding='utf-8-sig') as f:
        lines = f
        if f.read(1) == '{':
            lines = (gsm8k_line(*row) for _, *row in read_objects(path, 'question', 'answer'))
        f.seek(0)
        for line in lines:
            yield 'train', gsm8k_example(line), True, None


def read_gsm8k(input=None, streaming=True):
    if input:
        yield from read_local(read_gsm8k_lines, '', input)
        return
    for split in ('train', 'test'):
        for row in load_rows('openai/gsm8k', split, streaming=streaming, name='main'):
            line = gsm8k_line(row['question'], row['answer'])
            yield split, gsm8k_example(line), True, None


def vicuna_prompt(message):
    """Vicuna v1.1's template around the first message."""
    asked = f' {message} ' if message else ''
    return ('A chat between a curious user and an artificial intelligence assistant. The assistant '
            "gives helpful, detailed, and polite answers to the user's questions. "
            f'USER:{asked}ASSISTANT:')


def sharegpt_example(row):
    """The first round, where a human asks and GPT answers."""
    try:
        human, gpt = row['conversations'][:2]
        sides = human['from'], gpt['from']
        asked, answer = human['value'], gpt['value']
    except (KeyError, TypeError, ValueError):
        return []
    good = sides == ('human', 'gpt') and is_text(asked) and is_text(answer)
    return [([vicuna_prompt(asked)], [answer])] if good else []


def read_sharegpt(path):
    try:
        with open(path, encoding='utf-8-sig') as f:
            rows = json.load(f)
    except json.JSONDecodeError as error:
        raise ValueError(f'{path} is not JSON ({error})') from None
    require(isinstance(rows, list), f'{path} is not a list of conversations')
    for row in rows:
        yield 'train', sharegpt_example(row), True, len(rows)


def read_reverse(path):
    """Prompt and completion as one text, all of it to be learnt."""
    for _, prompt, completion in read_objects(path, 'prompt', 'completion'):
        yield 'train', [([], [prompt + completion])], True, None


# Sudoku, as prompts and answers: the cells row by row, '.' where the puzzle is open


@functools.cache
def sudoku_peers(rows, columns):
    """For each cell of a grid with boxes of rows x columns: those in its row, column or box."""
    side = rows * columns
    houses = [{('row', r), ('column', c), ('box', r // rows, c // columns)}
              for r, c in itertools.product(range(side), repeat=2)]
    return [[j for j, other in enumerate(houses) if j != i and house & other]
            for i, house in enumerate(houses)]


def place(cells, peers, i, value):
    """Put a value into cell i, and into its peers what has no choice left. cells: the values that
    each may have, as bits. Returns False where one is left with none."""
    placed = [(i, value)]
    for i, value in placed:  # which grows
        cells[i] = value
        for j in peers[i]:
            if cells[j] & value:
                cells[j] ^= value
                if not cells[j]:
                    return False
                if cells[j].bit_count() == 1:
                    placed.append((j, cells[j]))
    return True


def sudoku_solutions(cells, peers, rng):
    """All ways to fill in cells, in random order."""
    undecided = [(bits.bit_count(), i) for i, bits in enumerate(cells) if bits.bit_count() > 1]
    if not undecided:
        yield cells
        return
    _, i = min(undecided)
    values = [1 << k for k in range(cells[i].bit_length()) if cells[i] >> k & 1]
    for value in rng.sample(values, len(values)):
        attempt = cells.copy()
        if place(attempt, peers, i, value):
            yield from sudoku_solutions(attempt, peers, rng)


def sudoku_puzzle(rows, columns, clues, key):
    """(puzzle, solution), two strings: a puzzle with one solution and so many clues, or None where
    the grid that key decides has none when its cells are emptied in the order that key decides."""
    rng, peers = random.Random(key), sudoku_peers(rows, columns)
    empty = [2 ** (rows * columns) - 1] * len(peers)
    solution = next(sudoku_solutions(empty, peers, rng))
    given = dict(enumerate(solution))
    for i in rng.sample(range(len(peers)), len(peers)):
        if len(given) == clues:
            break
        cells = empty.copy()
        cells[i] ^= solution[i]  # with another value in this cell, is there a solution?
        consistent = all(place(cells, peers, j, bits) for j, bits in given.items() if j != i)
        if not consistent or next(sudoku_solutions(cells, peers, rng), None) is None:
            del given[i]
    if len(given) > clues:
        return None
    digits = ''.join(str(bits.bit_length()) for bits in solution)
    return ''.join(d if i in given else '.' for i, d in enumerate(digits)), digits


def read_sudoku(
    input=None, streaming=True, *,
    clues=30,         # given cells of a puzzle
    puzzles=100_000,  # of both splits
    box='3x3',        # rows and columns of a box
    seed=0,           # another one gives other puzzles
):
    """Puzzles with one solution, every 20th for validation."""
    require(re.fullmatch('2x2|2x3|3x2|2x4|4x2|3x3', str(box)),
            f"box={box!r}: rows and columns of a box of 4 to 9 cells, such as '3x3'")
    rows, columns = map(int, box.split('x'))
    cells = (rows * columns) ** 2
    require(type(clues) is int and 0 <= clues <= cells, f'clues={clues!r}: 0 to {cells} of them')
    require(type(puzzles) is int and puzzles > 0, f'puzzles={puzzles!r}: at least 1')
    seen, last = set(), 0
    for number in itertools.count():
        require(number < last + 1000, f'{len(seen)} puzzles with clues={clues} were found, and '
                'none in 1000 more grids: give more clues, or fewer puzzles')
        found = sudoku_puzzle(rows, columns, clues, key_of(seed, number))
        if found is None or found in seen:
            continue
        puzzle, solution = found
        yield 'train' if len(seen) % 20 else 'validation', [([puzzle], [solution])], True, puzzles
        seen.add(found)
        last = number
        if len(seen) == puzzles:
            return


# A dataset is an entry: name -> reader(input=None, streaming=True, *, its own options)

fineweb = partial(
    read_hub, 'HuggingFaceFW/fineweb', splits={'train': 'validation'}, most=500_000,
    benchmark='validation')
benchmark_of_hub = partial(read_hub, splits=('train', 'validation', 'test'), benchmark='validation')
wikitext = partial(benchmark_of_hub, 'Salesforce/wikitext', keep_newline=True)
papers = partial(
    benchmark_of_hub, 'armanc/scientific_papers', splits=('validation', 'test'), column='article',
    revision='refs/convert/parquet')
DATASETS = {
    'stdlib': read_stdlib,
    'openwebtext': partial(read_hub, 'Skylion007/openwebtext', validation_last=100_000),  # MDLM's
    'owt-gpt2-1024-split': partial(  # xlm's
        read_hub, 'dhruveshpatel/owt-gpt2-1024-split', splits=('train', 'validation')),
    'slimpajama': partial(  # SMDM's, without code
        read_hub, 'cerebras/SlimPajama-627B', splits=('train', 'validation'),
        keep=lambda row: (row.get('meta') or {}).get('redpajama_set_name') != 'RedPajamaGithub'),
    # the benchmarks of MDLM's tables 2 and 3; a document is a row of the hub
    'ptb': partial(
        benchmark_of_hub, 'ptb-text-only/ptb_text_only', column='sentence',
        revision='refs/convert/parquet'),
    'wikitext2': partial(wikitext, name='wikitext-2-raw-v1'),
    'wikitext103': partial(wikitext, name='wikitext-103-raw-v1'),
    'lm1b': partial(
        read_hub, 'billion-word-benchmark/lm1b', splits=('train', 'test'), benchmark='test',
        revision='refs/convert/parquet'),
    'lambada': partial(  # all there is, MDLM's validation
        benchmark_of_hub, 'EleutherAI/lambada_openai', splits={'test': 'validation'},
        name='default'),
    'ag_news': partial(read_hub, 'fancyzhx/ag_news', splits=('train', 'test'), benchmark='test'),
    'scientific_papers_pubmed': partial(papers, data_files='pubmed/*{split}/*.parquet'),
    'scientific_papers_arxiv': partial(papers, data_files='arxiv/*{split}/*.parquet'),
    'fineweb-2024-10': partial(fineweb, name='CC-MAIN-2024-10'),  # SMDM's temporal shift
    'fineweb-2024-18': partial(fineweb, name='CC-MAIN-2024-18'),
    'text8': read_text8,
    'text8-crop': partial(read_text8, length=None),  # goes with packing 'crop'
    # SMDM's fine-tuning
    'gsm8k': read_gsm8k,
    'sharegpt': partial(
        read_local, read_sharegpt, 'ShareGPT_V3_unfiltered_cleaned_split_no_imsorry.json of '
        'anon8231489123/ShareGPT_Vicuna_unfiltered on the hub'),
    'sudoku': read_sudoku,
    'reverse': partial(read_local, read_reverse,
                       'all_prompts_train.jsonl of lukasberglund/reversal_curse on GitHub'),
}
MAX_LENGTH = {'gsm8k': 256, 'sharegpt': 2048}  # tokens; longer examples are left out, as released
BENCHMARKS = {'text8': 'test', 'text8-crop': 'test'} | {  # the split that is measured
    name: reader.keywords['benchmark'] for name, reader in DATASETS.items()
    if isinstance(reader, partial) and 'benchmark' in reader.keywords}

# how a dataset is measured where the constants of eval.py do not say
MEASURED_AS = {
    name: dict(packing='bos', max_tokens=100 * 1024 * 2048) for name in DATASETS
    if name.startswith('fineweb')}


def is_local(dataset):
    return dataset == 'stdlib' or dataset.startswith(('text:', 'pairs:'))


def paths_of(dataset):
    """The files and folders that text:PATH or pairs:PATH,PATH names."""
    kind, _, path = dataset.partition(':')
    if kind == 'text' or os.path.exists(path):  # whatever commas it has
        return [path]
    return path.split(',')


# (pattern, replacement) that join a benchmark's words and punctuation, by the beginning of its name
CLEAN_UP = {
    'wikitext': [
        ("s '", "s'"), (r"/' [0-9]/", "/'[0-9]/"), (' @-@ ', '-'), (' @,@ ', ','), (r' @\.@ ', '.'),
        (' : ', ': '), (' ; ', '; '), (r' \. ', '. '), (' ! ', '! '), (r' \? ', '? '),
        (' , ', ', '), (r'\(\s*([^\)]*?)\s*\)', r'(\1)'), (r'\[\s*([^\]]*?)\s*\]', r'[\1]'),
        (r'{\s*([^}]*?)\s*}', r'{\1}'), (r'"\s*([^"]*?)\s*"', r'"\1"'),
        (r"'\s*([^']*?)\s*'", r"'\1'"), ('= = = =', '===='), ('= = =', '==='), ('= =', '=='),
        (' \u00b0 ', '\u00b0'), (' \n', '\n'), ('\n ', '\n'), (' N ', ' 1 '), (" 's", "'s")],
    'ptb': [
        (" 's", "'s"), ("s ' ", "s' "), (" n't", "n't"), (' \n ', '\n'), (r'\\/', '/'),
        (' N(?= )', ' 1'), (r'\$ 1', '$1'), ('# 1', '#1'), ('<unk>', '?')],
    'lm1b': [
        (r'(https?) : / / ', r'\1://'), (r" '(\w+)", r"'\1"), (r' (\w+) \. ', r' \1. '),
        (r' (\w+) \.$', r' \1.'), (r' ([?!])( |$)', r'\1\2'), (r' ([,:;]) ', r'\1 '), (' / ', '/'),
        (r'" ([^"]+) "', r'"\1"'), (r"' ([^']+) '", r"'\1'"), (r'\( ([^()]+) \)', r'(\1)'),
        (r'\[ ([^\[\]]+) \]', r'[\1]'), (r'([$£]) ', r'\1')],
    'lambada': [('[\u201c\u201d]', '"'), (r'\s+\Z', ''), (r'\A\s*', '\n')],
}
CLEAN_UP['scientific_papers'] = CLEAN_UP['wikitext'] + CLEAN_UP['lm1b']


def detokenize(dataset_name, text):
    """A benchmark's text as MDLM's release cleans it up; other texts as they are."""
    beginning = next(filter(dataset_name.startswith, CLEAN_UP), None)
    for pattern, replacement in CLEAN_UP.get(beginning, ()):
        text = re.sub(pattern, replacement, text)
    return text


def own_options(dataset):
    """option -> (default, comment) of a reader's keyword-only parameters."""
    reader = DATASETS.get(dataset)
    if not inspect.isfunction(reader):
        return {}
    return {key: defaults_of(reader)[key] for key in inspect.getfullargspec(reader).kwonlyargs}


def hashed_splits():
    """The split of document 0, 1, 2, ... where the source does not say: by key_of its number, 5%
    validation."""
    for first in itertools.count(step=2 ** 12):
        keys = splitmix64(np.arange(first, first + 2 ** 12, dtype=np.uint64)) >> np.uint64(1)
        for is_train in (keys % np.uint64(20) > 0).tolist():
            yield 'train' if is_train else 'validation'


def documents(dataset, input=None, streaming=True, options=None):
    """What a dataset's reader yields, with the text cleaned up and every split chosen. options:
    the reader's own."""
    require(not (input and is_local(dataset)),
            f'--input={input} takes the place of the hub, which dataset {dataset} does not need')
    if dataset.startswith('text:'):
        reader = read_files(*paths_of(dataset))
    elif dataset.startswith('pairs:'):
        reader = read_pairs(paths_of(dataset))
    elif dataset in DATASETS:
        reader = DATASETS[dataset](input=input, streaming=streaming, **options or {})
    else:
        near, = difflib.get_close_matches(dataset, DATASETS, n=1, cutoff=0)
        raise ValueError(f"dataset '{dataset}' is not known; the nearest is '{near}'; text:PATH "
                         'and pairs:PATH take your own text')
    splits = hashed_splits()
    by_hash = next(splits)
    for split, text, last, total in reader:
        if split is None:
            split = by_hash
            if last:
                by_hash = next(splits)
        if dataset in DATASETS:
            text = detokenize(dataset, text)
        yield split, text, last, total


# -----------------------------------------------------------------------------
# documents -> data/<name>


def default_name(dataset, tokenizer):
    stems = [PurePath(path).stem for path in (paths_of(dataset)[0] or dataset, tokenizer)]
    return re.sub(r'[^\w.-]+', '_', '-'.join(stems))


def command_for(**constants):
    """The command that makes a data folder."""
    words = [f'--{key}={shlex.quote(str(value))}' for key, value in constants.items() if value]
    return ' '.join(['python data.py', *words])


def source_of(dataset, input, max_length):
    """What a data folder is made from. size (bytes) and sha256 are of local files, or None."""
    paths, endings = paths_of(dataset), TEXT_FILES
    if input:
        paths, endings = [input], ('',)
    elif dataset.startswith('pairs:'):
        endings = ('.jsonl',)
    files = [file for path in paths if os.path.exists(path) for file in files_of(path, endings)]
    source = dict(dataset=dataset, input=input, size=None, sha256=None)
    if files:
        source['size'] = sum(map(os.path.getsize, files))
        digest = hashlib.sha256()
        for file in files:
            digest.update(b'%d ' % os.path.getsize(file))
            with open(file, 'rb') as f:
                while block := f.read(PIECE):
                    digest.update(block)
        source['sha256'] = digest.hexdigest()[:16]
    if max_length:
        source['max_length'] = max_length
    return source


def read_meta(folder):
    """meta.json of a data folder. Raises FileNotFoundError where there is none, and ValueError with
    the command that rebuilds the folder where a file is not what the meta says."""
    path = f'{folder}/meta.json'
    if not os.path.isfile(path):
        raise FileNotFoundError(f'{path} is missing: {folder} is not a data folder; make one with '
                                'python data.py --dataset=NAME')
    try:
        with open(path) as f:
            meta = json.load(f)
        rebuild = f"rebuild it with {meta['command']}"
        whole = meta['source']['dataset'] and meta['tokenizer']['name']
        require(whole, f'{path} does not tell its dataset and tokenizer: {rebuild}')
        itemsize = {'uint16': 2, 'uint32': 4}[meta['dtype']]
        for split, n in meta['splits'].items():
            sizes = dict(bin=n['tokens'] * itemsize, idx=(n['documents'] + 1) * 8)
            if 'prompt_tokens' in n:
                sizes['prompt'] = n['documents'] * 8
            for ending, size in sizes.items():
                file = f'{folder}/{split}.{ending}'
                require(os.path.isfile(file), f'{file} is missing: {rebuild}')
                found = os.path.getsize(file)
                require(found == size, f'{file} holds {found:,} bytes, where meta.json says '
                        f'{size:,}: {rebuild}')
            ends = np.memmap(f'{folder}/{split}.idx', dtype='<i8', mode='r')[[0, -1]].tolist()
            require(ends == [0, n['tokens']],
                    f'{folder}/{split}.idx does not fit the tokens of meta.json: {rebuild}')
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        why = f'is not what data.py writes ({type(error).__name__}: {error})'
        raise ValueError(f'{path} {why}: remove {folder} and prepare it again') from None
    return meta


def parts_of(examples):
    return [part for example in examples for row in example for side in row for part in side]


def text_of(text):
    """A text as it is, an example as all its parts joined."""
    return text if isinstance(text, str) else ' '.join(parts_of([text]))


def training_texts(documents, limit=2 ** 27):
    """The first characters of the training split, enough for a tokenizer."""
    for split, text, *_ in documents:
        if split == 'train':
            text = text_of(text)
            yield text
            limit -= len(text)
            if limit < 0:
                return


def chunks(documents, progress):
    """About a megabyte of documents at a time: split, their texts, and which end a document."""
    chunk = defaultdict(lambda: ([], []))
    size, total = 0, None
    for split, text, last, total in documents:
        texts, ends = chunk[split]
        texts.append(text)
        ends.append(last)
        size += len(text if isinstance(text, str) else text_of(text))
        if size >= PIECE:
            progress.total = progress.total or total
            yield from chunk.items()
            chunk = defaultdict(lambda: ([], []))
            size = 0
    progress.total = progress.total or total
    yield from chunk.items()


def encode_texts(tok, texts, last, limit):
    """-> what to append to the files of a split, by their endings, and to its counts. Each document
    is closed by EOS."""
    ids, ends = tok.encode_batch(texts)
    ends = ends[np.array(last)]
    ids = np.insert(ids, ends, tok.eos_id)
    ends = ends + np.arange(1, len(ends) + 1)
    n = dict(documents=len(ends), tokens=len(ids), bytes=len(''.join(texts).encode()))
    return dict(bin=ids, idx=ends), n


def encode_examples(tok, examples, last, limit):
    """The same of examples. A document begins with BOS, and so does each of its parts where BOS is
    not EOS. An example with a document of more than `limit` tokens is left out."""
    parts = parts_of(examples)
    ids, ends = tok.encode_batch(parts) if parts else one_after_the_other([])
    encoded = iter(np.split(ids, ends[:-1]))
    kept, malformed, too_long = [], 0, 0
    for example in examples:
        documents = []
        for prompt, answer in example:
            ids, prompt_length = [], 0
            for number in range(1, len(prompt + answer) + 1):
                if number == 1 or tok.bos_id != tok.eos_id:
                    ids.append(tok.bos_id)
                ids += next(encoded).tolist()
                if number == len(prompt):
                    prompt_length = len(ids)
            ids.append(tok.eos_id)
            prompt = ''.join(prompt).encode()
            n_bytes = len(prompt) + len(''.join(answer).encode())
            documents.append((ids, n_bytes, prompt_length, len(prompt)))
        if not documents:
            malformed += 1
        elif max(len(ids) for ids, *_ in documents) > limit:
            too_long += 1
        else:
            kept += documents
    ids, ends = one_after_the_other([ids for ids, *_ in kept])
    sizes = np.array([sizes for _, *sizes in kept], dtype=np.int64).reshape(-1, 3)
    n_bytes, prompt_tokens, prompt_bytes = sizes.sum(axis=0).tolist()
    n = dict(documents=len(kept), tokens=len(ids), bytes=n_bytes, prompt_tokens=prompt_tokens,
             prompt_bytes=prompt_bytes, malformed_left_out=malformed, too_long_left_out=too_long)
    return dict(bin=ids, idx=ends, prompt=sizes[:, 1]), n


def encode_chunk(tok, limit, chunk):
    """What chunks() yields -> split, and what encode_texts or encode_examples makes of it."""
    split, (texts, last) = chunk
    encode = encode_texts if isinstance(texts[0], str) else encode_examples
    return split, *encode(tok, texts, last, limit)


def in_order(function, items, workers):
    """map(function, items) on threads, in order, with few items under way."""
    with ThreadPoolExecutor(workers) as pool:  # tokenizers work outside the interpreter's lock
        pending = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def write_bins(folder, tok, documents, size, name, limit):
    """Write the files of all splits into an empty folder -> the dtype's name, the counts of each
    split. size: bytes of the source, or None, for the progress bar. limit: tokens of an example."""
    dtype = np.dtype('<u2' if tok.vocab_size <= 2 ** 16 else '<u4')
    counts = {}
    unit = 'B' if size else ' documents'
    with tqdm(desc=f'tokenizing {name}', total=size, unit=unit, unit_scale=True) as progress:
        encode = partial(encode_chunk, tok, limit)
        for split, arrays, n in in_order(encode, chunks(documents, progress), os.cpu_count()):
            if split not in counts:
                counts[split] = Counter()
                arrays['idx'] = np.append(0, arrays['idx'])
            arrays['idx'] += counts[split]['tokens']
            counts[split].update(n)
            for ending, array in arrays.items():
                with open(f'{folder}/{split}.{ending}', 'ab') as f:
                    f.write(array.astype(dtype if ending == 'bin' else '<i8').tobytes())
            progress.update(n['bytes'] if size else n['documents'])
            speed = sum(n['tokens'] for n in counts.values()) / progress.format_dict['elapsed']
            progress.set_postfix_str(f'{speed:,.0f} tokens/s', refresh=False)
    return dtype.name, counts


def has_tokenizer(meta, tokenizer):
    """Whether the ids of a data folder are those of a tokenizer, given as for get_tokenizer."""
    if is_run(tokenizer):
        return meta['tokenizer'] == get_tokenizer(tokenizer).meta()
    return meta['tokenizer']['name'] == tokenizer


def is_prepared(folder, source, tokenizer):
    """Whether the folder is there and whole. Raises ValueError where it was made from others."""
    if not os.path.exists(folder):
        return False
    try:
        meta = read_meta(folder)
    except ValueError as error:
        print(f'{error}\nrebuilding {folder}', file=sys.stderr)
        return False
    theirs = meta['source']
    # the text itself may be gone by now, and older folders have no hash
    unknown = {key: None for key in ('size', 'sha256') if None in (source[key], theirs.get(key))}
    other = command_for(dataset=source['dataset'], tokenizer=tokenizer, name='NAME',
                        input=source['input'], max_length=source.get('max_length'))
    require(theirs | unknown == source | unknown and has_tokenizer(meta, tokenizer),
            f"{folder} was made from {theirs} with {meta['tokenizer']['name']}, not from {source} "
            f'with {tokenizer}: remove it, or make another by {other}, which is --dataset=NAME')
    return True


def prepare(dataset, tokenizer='gpt2', name=None, input=None, streaming=True, max_length=None,
            options=None):
    """Make data/<name> where it is not there, whole or not at all -> its path. Other processes
    wait. Raises ValueError where it was made from another source or tokenizer."""
    name = default_name(dataset, tokenizer) if name is None else str(name)
    require(re.fullmatch(r'[\w-][\w.-]*', name),
            f"name='{name}': letters, digits, '_', '-' and '.' make the name of a folder in data/")
    for key in options or {}:
        require(key in own_options(dataset), f"dataset '{dataset}' has no option '{key}'")
    folder = f'data/{name}'
    unfinished = f'data/.{name}.unfinished'
    os.makedirs('data', exist_ok=True)
    source = source_of(dataset, input, max_length)
    if options:
        source['options'] = options
    read = partial(documents, dataset, input, streaming, options)
    lock = FileLock(f'data/.{name}.lock')
    with lock:
        try:
            if is_prepared(folder, source, tokenizer):
                return folder
            shutil.rmtree(unfinished, ignore_errors=True)
            os.makedirs(unfinished)
            if is_bpe(tokenizer):
                print(f'training the tokenizer {tokenizer} on {dataset}', flush=True)
                size = int(tokenizer.removeprefix('bpe-'))
                train_bpe(training_texts(read()), size, f'{unfinished}/tokenizer.json')
            tok = get_tokenizer(tokenizer, unfinished)
            if tok.sha256 and not is_bpe(tokenizer):
                shutil.copy(f'{tokenizer}/tokenizer.json', unfinished)
            limit = max_length or MAX_LENGTH.get(dataset, math.inf)
            dtype, counts = write_bins(unfinished, tok, read(), source['size'], name, limit)
            whole = counts and all(count['documents'] for count in counts.values())
            require(whole, f'{input or dataset} holds no document{described(counts)}')
            command = command_for(
                dataset=dataset, tokenizer=tokenizer, name=name, input=input,
                max_length=max_length, **options or {})
            meta = dict(
                source=source, command=command, tokenizer=tok.meta(), dtype=dtype, splits=counts)
            with open(f'{unfinished}/meta.json', 'w') as f:
                json.dump(meta, f, indent=1)
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(unfinished, folder)
            return folder
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
            with contextlib.suppress(OSError):  # who waits for it makes another
                os.remove(lock.lock_file)


def described(counts):
    """The counts of each split, a line each."""
    text = ''
    for split, count in counts.items():
        text += f'\n  {split}: ' + ', '.join(f'{n:,} {what}' for what, n in count.items())
    return text.replace('_', ' ')


def find_or_prepare(dataset, tokenizer=None):
    """data/<dataset>, or the folder made from that dataset with that tokenizer (None: whichever
    data/<dataset> has, else gpt2), now if that needs no hub. Raises ValueError or
    FileNotFoundError, with the command that makes it."""
    dataset = str(dataset)
    folder = f'data/{dataset}'
    if not os.path.isfile(f'{folder}/meta.json'):
        tokenizer = tokenizer or 'gpt2'
        if is_local(dataset):
            return prepare(dataset, tokenizer)
        folder = f'data/{default_name(dataset, tokenizer)}'
        hint = f': make it with {command_for(dataset=dataset, tokenizer=tokenizer)}'
        if dataset not in DATASETS:
            hint = f", nor in data/{dataset}, and '{dataset}' is none of {', '.join(DATASETS)}"
        if not os.path.isdir(folder):
            raise FileNotFoundError(f'there is no data in {folder}{hint}')
    meta = read_meta(folder)
    source, theirs = meta['source'], meta['tokenizer']['name']
    other = command_for(dataset=source['dataset'], tokenizer=tokenizer, input=source['input'])
    require(tokenizer is None or has_tokenizer(meta, tokenizer),
            f"{folder} holds ids of the tokenizer '{theirs}', not '{tokenizer}': give "
            f'--tokenizer={theirs}, or what is made by {other}')
    return folder


# -----------------------------------------------------------------------------
# rows of a batch. A packing is a function (TokenRows, indices (n,)) -> x0 (n, L) and those of the
# masks (n, L) that are not all True


def columns_of(rows, indices):
    """Where in the stream the tokens of rows are: (n, width)."""
    return np.add.outer(rows.starts(indices), np.arange(rows.width))


def between(inner, bos_id, eos_id):
    return np.pad(inner, ((0, 0), (1, 1)), constant_values=((0, 0), (bos_id, eos_id)))


def pack_wrap(docs, block_size, bos_id, eos_id):
    """Rows (n, block_size) int64 as MDLM packs docs (lists of ids): each is closed by EOS, all are
    joined, a row is BOS, the next block_size - 2 ids, EOS, and the rest is dropped."""
    stream = np.array([i for doc in docs for i in [*doc, eos_id]], dtype=np.int64)
    width = block_size - 2
    inner = stream[:len(stream) // width * width].reshape(-1, width)
    return between(inner, bos_id, eos_id)


def wrap_rows(rows, indices):
    """BOS, the next L-2 tokens of the stream, EOS."""
    inner, _ = concat_rows(rows, indices)
    document = between(np.ones(inner.shape, dtype=bool), False, False)
    return between(inner, rows.tok['bos_id'], rows.tok['eos_id']), dict(document=document)


def concat_rows(rows, indices):
    """The next L tokens of the stream, or with 'crop' from any place of the training stream on: the
    permutation that picks a row picks the place."""
    return rows.tokens[columns_of(rows, indices)].astype(np.int64), {}


def bos_rows(rows, indices):
    """The next L tokens of the stream in which each document begins with BOS and has no EOS."""
    columns = columns_of(rows, indices)
    x0 = rows.tokens[columns - 1].astype(np.int64)  # BOS stands where the EOS before it stood
    begins = rows.offsets[np.searchsorted(rows.offsets, columns)] == columns
    x0[begins] = rows.tok['bos_id']
    return x0, {}


def padded(sequences, length, pad_id):
    """Sequences of ids -> x0 (n, L), padded on the right, and where the ids are."""
    ids, ends = one_after_the_other(sequences)
    is_filled = np.arange(length) < np.diff(ends, prepend=0)[:, None]
    x0 = np.full(is_filled.shape, pad_id, dtype=np.int64)
    x0[is_filled] = ids
    return x0, is_filled


def nothing_but(document, attention_mask):
    """The masks of rows whose padding is neither corrupted nor scored."""
    return dict(
        document=document, maskable=document, scored=document, attention_mask=attention_mask)


def pad_rows(rows, indices):
    """One document and its EOS, cut to L, and padding: a token like any other, or with
    loss_on_padding=False neither corrupted, looked at, nor scored."""
    documents = [rows.document(i)[:rows.block_size] for i in indices]
    x0, document = padded(documents, rows.block_size, rows.tok['pad_id'])
    if rows.loss_on_padding:
        return x0, dict(document=document)
    return x0, nothing_but(document, document)


def sentence_rows(rows, indices):
    """BOS ([CLS]), one document cut to L-2, EOS ([SEP]), and padding, which is not scored."""
    bos, eos = [rows.tok['bos_id']], [rows.tok['eos_id']]
    texts = [np.concatenate((bos, rows.document(i)[:-1][:rows.width], eos)) for i in indices]
    x0, scored = padded(texts, rows.block_size, rows.tok['pad_id'])
    document = scored.copy()
    document[:, 0] = False
    return x0, dict(document=document, scored=scored)


def pair_rows(rows, indices):
    """Prompt, answer, and EOS to the end, which is with pad_to='batch' that of the longest of the
    rows. The prompt is neither corrupted nor scored; what pads is as with pad_rows."""
    kept = rows.kept[indices]
    length = rows.block_size if rows.pad_to == 'block' else rows.longest(indices)
    x0, filled = padded([rows.document(i) for i in kept], length, rows.tok['eos_id'])
    answer = np.arange(length) >= rows.prompt[kept][:, None]
    document = answer & filled
    if rows.loss_on_padding:
        return x0, dict(document=document, maskable=answer, scored=answer)
    return x0, nothing_but(document, filled)


def document_rows(rows, indices):
    """Whole documents and their EOS one after another, then padding, which is neither corrupted,
    looked at nor scored. attention_mask numbers the documents of a row (model.within_documents)."""
    texts = [[rows.document(i) for i in rows.members[first:end]] for first, end in
             zip(rows.row_ends[indices], rows.row_ends[indices + 1], strict=True)]
    x0, document = padded(map(np.concatenate, texts), rows.block_size, rows.tok['pad_id'])
    numbers = [np.repeat(np.arange(len(parts)), [len(ids) for ids in parts]) for parts in texts]
    return x0, nothing_but(document, padded(numbers, rows.block_size, -1)[0])


def spaced(firsts, counts, step):
    """counts[i] numbers from firsts[i] on, a step apart, for every i."""
    index = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    return np.repeat(firsts, counts) + step * index


def cut_longer(offsets, length):
    """offsets, with those of documents longer than `length` at every `length` tokens too."""
    pieces = -(-np.diff(offsets) // length)
    return np.append(spaced(offsets[:-1], pieces, length), offsets[-1])


def best_fit(lengths, room, window=1024):
    """Fill rows of `room` from `window` neighbours at a time: the longest that is left, then again
    and again the longest that fits -> members (n,), row after row, and where each begins, and n."""
    members, starts = array('q'), array('q', [0])
    for first in range(0, len(lengths), window):
        index = np.argsort(lengths[first:first + window], kind='stable')
        sizes = lengths[first:first + window][index].tolist()  # ascending
        index = (first + index).tolist()
        found = []
        while sizes:
            row, left, fits = [], room, len(sizes)
            while fits:
                left -= sizes.pop(fits - 1)
                row.append(index.pop(fits - 1))
                fits = bisect.bisect_right(sizes, left, 0, fits - 1)
            found.append(sorted(row))
        for row in sorted(found):  # the first rows are not to be those of the longest
            members.extend(row)
            starts.append(len(members))
    return np.array(members), np.array(starts)


PACKINGS = {  # name -> its function, what it cuts up, and the tokens that it adds to a row
    'wrap': (wrap_rows, 'stream', 2),
    'concat': (concat_rows, 'stream', 0),
    'bos': (bos_rows, 'stream', 0),
    'crop': (concat_rows, 'stream', 0),
    'pad': (pad_rows, 'documents', 0),
    'sentence': (sentence_rows, 'documents', 2),
    'pair': (pair_rows, 'documents', 0),
    'documents': (document_rows, 'documents', 0),
}


class TokenRows:
    """The rows of a split: rows[indices] -> dict of x0 (n, L) int64 and, (n, L) bool each,
    maskable (may be corrupted), scored (counts in the loss), document (a token of the text or its
    EOS, not added by the packing) and attention_mask (may be looked at; 'documents': int64).

    packing: a key of PACKINGS. pad_to: 'block' or 'batch', see pair_rows. grouping: so many
    documents at a time are cut up, and the rest of each group is dropped (MDLM: 1,000); None: all
    are one group. Raises ValueError and FileNotFoundError, as read_meta does."""

    def __init__(self, folder, split, block_size, packing, loss_on_padding=True, pad_to='block',
                 grouping=None):
        self.meta = read_meta(folder)
        splits = self.meta['splits']
        require(packing in PACKINGS,
                f"packing '{packing}' is not known: choose from {', '.join(PACKINGS)}")
        self.pack, unit, added = PACKINGS[packing]
        require(block_size > added, f'block_size={block_size} is too short for packing {packing}')
        require(split in splits, f"{folder} has no split '{split}', only {', '.join(splits)}: give "
                '--val_split to train.py, --split to eval.py')
        self.name = f'{folder}/{split}'
        self.tok = self.meta['tokenizer']
        self.rebuild = f"rebuild it with {self.meta['command']}"
        self.counts = splits[split]
        self.block_size = block_size
        self.width = block_size - added
        self.loss_on_padding = loss_on_padding
        self.pad_to = pad_to
        self.first_given = False  # the first token of a row is neither masked nor scored
        # plain arrays: their slices take a tenth of the time
        dtype = np.dtype(self.meta['dtype']).newbyteorder('<')
        self.tokens = np.asarray(np.memmap(f'{self.name}.bin', dtype=dtype, mode='r'))
        self.offsets = np.asarray(np.memmap(f'{self.name}.idx', dtype='<i8', mode='r'))
        self.length = self.counts['documents']
        self.left_out = 0

        anywhere = packing == 'crop' and split == 'train'
        require(not grouping or unit == 'stream' and not anywhere,
                f"grouping={grouping}: rows of packing '{packing}' are not cut from groups")
        if unit == 'stream':
            self.cut_stream(anywhere, grouping)
        elif packing == 'pair':
            self.choose_examples()
        elif packing == 'documents':
            self.document(np.diff(self.offsets).argmin())  # refuses damaged ones
            self.offsets = cut_longer(self.offsets, block_size)
            self.members, self.row_ends = best_fit(np.diff(self.offsets), block_size)
            self.length = len(self.row_ends) - 1
        problem = f'holds {len(self.tokens)} tokens, less than one row of {block_size}'
        if self.left_out:
            problem = f'holds no document of at most {block_size} tokens'
        require(self.length, f'{self.name}.bin {problem}: prepare more text, or lower block_size')

    def cut_stream(self, anywhere, grouping):
        """Rows begin anywhere, or side by side, anew in each group of documents."""
        self.step = 1 if anywhere else self.width
        self.length = len(self.tokens) // self.width
        self.grouped = None
        if anywhere:  # the EOS at the very end is left out
            self.length = max(0, len(self.tokens) - self.width)
        if grouping:
            firsts = self.offsets[:-1:grouping]
            counts = np.diff(np.append(firsts, self.offsets[-1])) // self.width
            self.grouped = spaced(firsts, counts, self.width)
            self.length = len(self.grouped)

    def starts(self, indices):
        """Where rows cut from the stream begin in it."""
        return indices * self.step if self.grouped is None else self.grouped[indices]

    def choose_examples(self):
        """Which documents fit into a row: the others are left out, with all of their example."""
        require('prompt_tokens' in self.counts, f"packing 'pair': {self.name} has no prompts and "
                'answers; python data.py --dataset=pairs:FILE makes data that have them')
        self.prompt = np.asarray(np.memmap(f'{self.name}.prompt', dtype='<i8', mode='r'))
        self.lengths = np.diff(self.offsets)
        fits = self.lengths <= self.block_size
        dataset = self.meta['source']['dataset']
        if dataset == 'gsm8k':  # two documents an example
            fits = fits.reshape(-1, 2).all(axis=1).repeat(2)
        elif dataset not in MAX_LENGTH:
            i = self.prompt.argmax()
            require(self.prompt[i] < self.block_size,
                    f'{self.name}: the prompt of document {i} has {self.prompt[i]} tokens, which '
                    f'leaves no answer in a row of {self.block_size}: raise block_size, or prepare '
                    f'again with data.py --max_length={self.block_size}')
        self.kept = np.flatnonzero(fits)
        self.length = len(self.kept)
        self.left_out = len(fits) - self.length
        # for bits/byte, which are of answers alone
        self.counts = self.counts | {
            key: self.counts[key] - self.counts[f'prompt_{key}'] for key in ('tokens', 'bytes')}

    def longest(self, indices):
        """The tokens of the longest of these rows of packing 'pair', its EOS included."""
        return int(self.lengths[self.kept[indices]].max())

    def document(self, i):
        """The ids of document i, its EOS included."""
        start, end = self.offsets[i], self.offsets[i + 1]
        require(0 <= start < end <= len(self.tokens),
                f'the offsets of {self.name} do not rise at document {i}: {self.rebuild}')
        return self.tokens[start:end]

    def __len__(self):
        return self.length

    def __getitem__(self, indices):
        if isinstance(indices, slice):
            indices = np.arange(*indices.indices(len(self)))
        indices = np.atleast_1d(np.asarray(indices))
        for i in (indices.min(initial=0), indices.max(initial=0)):
            if not 0 <= i < len(self):
                raise IndexError(f'row {i} of {len(self)}')
        x0, masks = self.pack(self, indices)
        largest, n = x0.max(initial=0), self.tok['vocab_size']
        require(largest < n, f'{self.name}.bin holds the id {largest}, outside of the {n:,} ids of '
                f'its tokenizer: {self.rebuild}')
        everything = np.ones(x0.shape, dtype=bool)
        for key in ('maskable', 'scored', 'document', 'attention_mask'):
            masks.setdefault(key, everything)
        if self.first_given:
            later = np.arange(x0.shape[1]) > 0
            masks |= {key: masks[key] & later for key in ('maskable', 'scored')}
        return {key: torch.from_numpy(array) for key, array in dict(x0=x0, **masks).items()}


# -----------------------------------------------------------------------------

if __name__ == '__main__':
    configure(globals(), reader_options={
        key: (default, f'{known}: {about}') for known in DATASETS
        for key, (default, about) in own_options(known).items()})
    folder = prepare(dataset, tokenizer, name, input, streaming, max_length, reader_options)
    meta = read_meta(folder)
    tok = meta['tokenizer']
    print(f"{folder}: tokenizer {tok['name']}, {tok['vocab_size']:,} ids with the mask, "
          f"{meta['dtype']}{described(meta['splits'])}")

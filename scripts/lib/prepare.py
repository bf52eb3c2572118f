"""Makes data/BENCH/: see scripts/prepare.sh."""

import argparse
import functools
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time

import corpora
from settings import (BPE_TYPES, DATA_TOOLS, UserError, choose, cpus, data_root, is_lm, load, locked, main, read_json,
                      sha256, tool, versions, whole_directory, write_json)

SCHEMA = 1


def parse(arguments):
    parser = argparse.ArgumentParser(prog="scripts/prepare.sh", add_help=False, allow_abbrev=False)
    parser.add_argument("benchmark")
    parser.add_argument("--bpe")
    parser.add_argument("--archive-dir", default=os.environ.get("DATA_ARCHIVES") or None)
    parser.add_argument("--archive")
    parser.add_argument("--text-dir")
    parser.add_argument("--force", action="store_true")
    return parser.parse_args(arguments)


def prepare(arguments):
    options = parse(arguments)
    config = load(options.benchmark)
    if is_lm(config):
        if options.bpe is not None:
            raise UserError(f"--bpe {options.bpe!r}: the text of {options.benchmark} is used word by word, as it is")
        languages, settings = ["txt"], {}
    else:
        own = config.hydra.job.env_set
        languages = [config.task.source_lang, config.task.target_lang]
        settings = {
            "languages": languages,
            "bpe": choose("--bpe", options.bpe or own.PN_BPE, BPE_TYPES),
            "bpe_size": int(own.PN_BPE_SIZE),
            "lowercase": bool(own.PN_LOWERCASE),
            "normalize_punctuation": bool(own.PN_NORMALIZE_PUNCTUATION),
        }
    root = data_root()
    target = root / options.benchmark
    source = corpora.source(options.benchmark, languages, text_dir=options.text_dir, archive_dir=options.archive_dir,
                            archive=options.archive, download_dir=root / "downloads" / options.benchmark)
    request = {"schema": SCHEMA, "benchmark": options.benchmark, "settings": settings, "sources": source.identity()}

    # The workers are started first, so that they do not inherit the lock.
    with multiprocessing.Pool(cpus(), initializer=end_with_parent) as pool, locked(target) as lock:
        if target.exists() and not options.force:
            refuse_other(target, request)
            print(f"{target} is prepared already; nothing to do (--force prepares it again)")
            return
        with whole_directory(target) as directory:
            if is_lm(config):
                facts = build_lm(directory, source, options.benchmark, lock)
                summary = {split: facts["counts"][split]["tokens"] for split in corpora.SPLITS}
            else:
                summary = build(directory, source, settings, pool, lock)
                facts = {"sentences": summary}
            outputs = {str(path.relative_to(directory)): sha256(path)
                       for path in sorted(directory.rglob("*")) if path.is_file()}
            write_json(directory / "prepared.json",
                       {**request, **facts, "versions": versions(DATA_TOOLS), "outputs": outputs})
    print(f"prepared {target}: " + ", ".join(f"{split} {count:,}" for split, count in summary.items())
          + (" tokens" if is_lm(config) else ""))


def refuse_other(target, request):
    """Refuses if what lies in target was not made by the same request."""
    if not (target / "prepared.json").is_file():
        raise UserError(f"{target} exists and was not made by scripts/prepare.sh; move it away, or replace it with --force")
    stamp = read_json(target / "prepared.json")
    there = {**stamp.get("settings", {}), "sources": stamp.get("sources")}
    wanted = {**request["settings"], "sources": request["sources"]}
    differing = [key for key in wanted if there.get(key) != wanted[key]]
    if differing:
        details = "; ".join("other source text" if key == "sources" else
                            f"{key} is {there.get(key)}, asked for {wanted[key]}" for key in differing)
        raise UserError(f"{target} was prepared otherwise ({details}); --force replaces it")


def build(directory, source, settings, pool, lock):
    """raw/ -> tok/ -> bpe/ -> data-bin/; gives the number of sentence pairs of each split."""
    names = [f"{split}.{language}" for split in corpora.SPLITS for language in settings["languages"]]
    raw, tok, bpe = (directory / name for name in ("raw", "tok", "bpe"))
    for folder in (tok, bpe):
        folder.mkdir()
    print("[1/4] text", flush=True)
    source.write(raw)
    sentences = corpora.check_parallel(raw, names)

    print("[2/4] tokenization (Moses)", flush=True)
    for name in names:
        work = functools.partial(tokenize, language=name.rpartition(".")[2], lowercase=settings["lowercase"],
                                 normalize=settings["normalize_punctuation"])
        transform(raw / name, tok / name, lambda lines: pool.imap(work, lines, chunksize=500))
    sentences["train"] = drop_empty([tok / f"train.{language}" for language in settings["languages"]])

    print(f"[3/4] BPE ({settings['bpe']}, {settings['bpe_size']})", flush=True)
    train = [tok / f"train.{language}" for language in settings["languages"]]
    encode = {"subword_nmt": subword_nmt, "sentencepiece": sentencepiece}[settings["bpe"]](train, bpe, settings["bpe_size"])
    for name in names:
        transform(tok / name, bpe / name, lambda lines: map(encode, lines))

    print("[4/4] binarization", flush=True)
    binarize(directory, [tool("fairseq-preprocess"), "--source-lang", settings["languages"][0], "--target-lang",
                         settings["languages"][1], "--joined-dictionary", "--workers", "1"],
             {split: bpe / split for split in corpora.SPLITS}, lock)
    return sentences


def build_lm(directory, source, benchmark, lock):
    """raw/ -> data-bin/, the text as it is; gives what is in it."""
    raw = directory / "raw"
    texts = {split: raw / f"{split}.txt" for split in corpora.SPLITS}
    print("[1/2] text", flush=True)
    source.write(raw)
    corpora.check_parallel(raw, [path.name for path in texts.values()])
    facts = corpora.count_words(raw)
    for split, count in facts["counts"].items():
        print(f"  {split}: {count['words']:,} words + {count['lines']:,} line ends = {count['tokens']:,} tokens; "
              f"{count['unknown']:,} are <unk>, {count['out_of_vocabulary']:,} more are not in the training text",
              flush=True)
    print(f"  {facts['types']:,} types, <unk> and the line end among them", flush=True)
    differing = corpora.differing_counts(benchmark, facts)
    if differing:
        print(f"  NOT the published {benchmark}, whose counts stand in parentheses: {', '.join(differing)}", flush=True)

    print("[2/2] binarization", flush=True)
    binarize(directory, [tool("fairseq-preprocess"), "--only-source", "--workers", str(cpus())], texts, lock)
    log = (directory / "data-bin" / "preprocess.log").read_text(encoding="utf-8")
    theirs = {split: int(found) for split, found in re.findall(r"raw/(\w+)\.txt: \d+ sents, (\d+) tokens", log)}
    ours = {split: count["tokens"] for split, count in facts["counts"].items()}
    if theirs != ours:
        raise UserError(f"fairseq-preprocess counts other tokens, {theirs}, than stand in the text, {ours}")
    return {**facts, "published": not differing}


def end_with_parent():
    """Makes a worker end when its parent is gone: one that is killed cannot tell its workers."""
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def transform(source, target, function):
    """Writes function(lines of source) to target, one line for each, with a sign of life every 10,000."""
    with open(source, encoding="utf-8", newline="\n") as read, open(target, "w", encoding="utf-8", newline="\n") as write:
        count = 0
        for count, line in enumerate(function(line.rstrip("\r\n") for line in read), 1):
            write.write(line + "\n")
            if count % 10000 == 0:
                print(f"  {source.parent.name}/{source.name}: {count:,} lines", flush=True)
    print(f"  {target.parent.name}/{target.name}: {count:,} lines", flush=True)


@functools.lru_cache(maxsize=None)
def moses(language):
    from sacremoses import MosesPunctNormalizer, MosesTokenizer

    return MosesPunctNormalizer(lang=language), MosesTokenizer(lang=language)


def tokenize(line, language, lowercase, normalize):
    normalizer, tokenizer = moses(language)
    if lowercase:
        line = line.lower()
    if normalize:
        line = normalizer.normalize(line)
    return tokenizer.tokenize(line, return_str=True)


def drop_empty(paths):
    """Drops the pairs of the training text of which a side is empty; gives the number left."""
    texts = [path.read_text(encoding="utf-8").split("\n")[:-1] for path in paths]
    kept = [pair for pair in zip(*texts) if all(side.strip() for side in pair)]
    dropped = len(texts[0]) - len(kept)
    if not kept:
        raise UserError("no sentence pair of the training text has words on both sides")
    if dropped:
        print(f"  dropped {dropped:,} training pairs with an empty side", flush=True)
        for path, side in zip(paths, zip(*kept)):
            path.write_text("\n".join(side) + "\n", encoding="utf-8")
    return len(kept)


def subword_nmt(train, directory, size):
    """Learns joint BPE codes with subword-nmt; gives the function that encodes a line."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # its progress bar fills a log file
    from subword_nmt.apply_bpe import BPE
    from subword_nmt.learn_bpe import learn_bpe

    def lines():
        for path in train:
            with open(path, encoding="utf-8", newline="\n") as stream:
                yield from stream

    codes = directory / "codes"
    with open(codes, "w", encoding="utf-8") as write:
        learn_bpe(lines(), write, size)
    with open(codes, encoding="utf-8") as read:
        return BPE(read).process_line


def sentencepiece(train, directory, size):
    """Learns a joint SentencePiece BPE model; gives the function that encodes a line."""
    import sentencepiece as spm

    try:
        spm.SentencePieceTrainer.train(
            input=[str(path) for path in train], model_prefix=str(directory / "sentencepiece"), model_type="bpe",
            vocab_size=size, character_coverage=1.0, normalization_rule_name="identity", num_threads=1, minloglevel=2)
    except RuntimeError as error:
        raise UserError(f"sentencepiece cannot learn PN_BPE_SIZE={size} pieces from this text: {error}") from None
    processor = spm.SentencePieceProcessor(model_file=str(directory / "sentencepiece.model"))
    return lambda line: " ".join(processor.encode(line, out_type=str))


def binarize(directory, command, texts, lock):
    """data-bin/ by a fairseq-preprocess command, given split -> its text; its output goes to data-bin/preprocess.log.

    It holds the lock, too: should this process be killed, the next one must not start while it still writes.
    """
    command = [*command, "--destdir", str(directory / "data-bin")]
    for split, text in texts.items():
        command += [f"--{split}pref", str(text)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, pass_fds=(lock.fileno(),))
    if done.returncode:
        sys.stdout.write(done.stdout)
        raise UserError(f"fairseq-preprocess failed with exit status {done.returncode}; its output is above")
    # Its own log names the temporary directory; ours stays the same from run to run.
    (directory / "data-bin" / "preprocess.log").write_text(
        "".join(line + "\n" for line in done.stdout.splitlines() if "sents" in line and "tokens" in line)
        .replace(str(directory) + os.sep, ""), encoding="utf-8")


if __name__ == "__main__":
    main(prepare, sys.argv[1:])

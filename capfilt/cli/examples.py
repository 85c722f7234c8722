"""Examples of every command, as its help and docs/cli.md show them. Tests parse each of them."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[tuple[str, str], ...]] = {
    "": (
        ("capfilt run quickstart", "Without data or models of your own, in a minute:"),
        ("capfilt doctor", "What is installed, and what lacks:"),
        ("capfilt download urls.parquet runs/mine", "Your own URLs into shards:"),
        ("capfilt run capfilt runs/mine", "Their captions, ranks and filter:"),
    ),
    "demo": (("capfilt demo", "The whole job on the miniature world, in runs/demo:"),),
    "download": (
        ("capfilt download urls.parquet runs/mine", "A table with the columns url and text:"),
        (
            "capfilt download 's3://bucket/cc3m-*.tsv' runs/cc3m --url-column image_url --caption-column alt",
            "Several files of a store, columns of other names:",
        ),
        (
            "capfilt download urls.csv runs/mine --num-processes 16 --num-threads 64 --retries 1",
            "More at the same time, and a second try:",
        ),
        ("capfilt download urls.jsonl s3://data/mine --engine ray --address auto", "By the workers of a Ray cluster:"),
    ),
    "retry": (
        ("capfilt retry runs/mine", "Those whose failure may pass:"),
        ("capfilt retry runs/mine --reason timeout --timeout 120", "Time-outs alone, with more time:"),
    ),
    "import": (
        ("capfilt import 'shards/{00000..00099}.tar' runs/mine", "A hundred tars of img2dataset:"),
        ("capfilt import 'coco-train-*.tar' runs/coco --human", "Captions that people wrote, ready to train on:"),
    ),
    "caption": (
        (
            "capfilt caption runs/mine --captioner Salesforce/blip-image-captioning-large",
            "Ten captions an image by nucleus sampling:",
        ),
        (
            "capfilt caption runs/mine --captioner models/captioner --decoding beam --num-beams 3 --generation beam",
            "One by beam search, in a generation beside the first:",
        ),
    ),
    "rank": (
        ("capfilt rank runs/mine --keep 2", "CLIP ViT-L/14, the two best of each image:"),
        (
            "capfilt rank runs/mine --clip-model ViT-B-32 --clip-weights laion2b_s34b_b79k --include-web",
            "Another CLIP, the web caption among them:",
        ),
    ),
    "filter": (
        ("capfilt filter runs/mine --filter-model Salesforce/blip-itm-large-coco", "Scores and the manifest:"),
        (
            "capfilt filter runs/mine --filter-model models/filter --threshold 0.8",
            "A filter of your own, and stricter:",
        ),
    ),
    "run": (
        ("capfilt run quickstart", "The miniature world through the embedded models:"),
        ("capfilt run capfilt runs/mine", "Captions, ranks and filter of shards that are there:"),
        (
            "capfilt run capfilt runs/mine --dry-run --probe 64 --price-per-hour 2.5",
            "What is left, how long it takes and what it costs; nothing is changed:",
        ),
        ("capfilt run mine.toml runs/mine --curate-only --engine ray --address auto", "Your recipe, on a Ray cluster:"),
    ),
    "recipe": (
        ("capfilt recipe list", "The bundled recipes:"),
        ("capfilt recipe new mine.toml --from capfilt", "One of your own:"),
    ),
    "recipe list": (("capfilt recipe list", "Names and what each does:"),),
    "recipe show": (
        ("capfilt recipe show blip2", "Every setting with its sentence:"),
        ("capfilt recipe show mine.toml --json", "For a program:"),
    ),
    "recipe new": (
        ("capfilt recipe new mine.toml", "From the default recipe:"),
        ("capfilt recipe new mine.toml --from blip2 --no-schema", "From another one, without a schema beside it:"),
    ),
    "recipe check": (
        ("capfilt recipe check mine.toml", "All mistakes, or what it would do:"),
        ("capfilt recipe check mine.toml other.toml --json", "Several, for a program:"),
    ),
    "recipe schema": (("capfilt recipe schema", "To a file, with `> capfilt-recipe.schema.json` after it:"),),
    "select": (
        ("capfilt select runs/mine --threshold 0.6 --keep 1", "Stricter, and one synthetic caption an image:"),
        ("capfilt select runs/mine --sources web --generation web", "Web captions alone, in a generation:"),
    ),
    "stats": (
        ("capfilt stats runs/mine", "A run on one screen:"),
        ("capfilt stats runs/mine --section hosts --section threshold", "Two sections in full:"),
        ("capfilt stats runs/mine --watch 5", "While another terminal works on it:"),
        ("capfilt stats runs/mine --compare runs/other --json", "What is different in another run, for a program:"),
        ("capfilt stats cc3m-tars", "A folder of tars that is no run:"),
    ),
    "show": (
        ("capfilt show runs/mine", "A run's samples, one after another:"),
        (
            "capfilt show runs/mine --where \"itm_score between 0.4 and 0.6 and source = 'web'\"",
            "Web captions around the threshold:",
        ),
        ("capfilt show runs/mine --reason low_itm --random 20 --explain embedded", "Dropped ones, and why:"),
    ),
    "verify": (
        ("capfilt verify runs/mine", "Rows, records and manifests against each other:"),
        ("capfilt verify runs/mine --deep", "Every byte too:"),
    ),
    "export": (
        ("capfilt export runs/mine --output pairs.jsonl", "The kept pairs:"),
        ("capfilt export runs/mine --output all.csv --dropped", "All, each dropped one with its reason:"),
        ("capfilt export runs/mine --shard-mb 500", "Curated WebDataset shards, in runs/mine/curated:"),
        ("capfilt export runs/mine --output mine-hf --format datasets", "A Hugging Face dataset:"),
    ),
    "report": (
        ("capfilt report runs/mine --output mine.html --pairs 50", "A page that opens anywhere:"),
        (
            "capfilt report runs/mine --output mine.html --explain Salesforce/blip-itm-large-coco",
            "With maps of where a model looks:",
        ),
    ),
    "train": (
        (
            "capfilt train stage1 runs/mine --image-encoder openai/clip-vit-large-patch14"
            " --qformer-init google-bert/bert-base-uncased --output runs/mine/stage1",
            "BLIP-2's first stage on a run that has a manifest:",
        ),
    ),
    "train blip": (
        (
            "capfilt train blip runs/mine runs/human --text-init google-bert/bert-base-uncased"
            " --output runs/mine/blip --set run_weights=1,2",
            "From BERT, on two runs, the second shown twice as often:",
        ),
    ),
    "train captioner": (
        (
            "capfilt train captioner runs/coco --init runs/mine/blip --output runs/mine/captioner",
            "From what `train blip` saved, on people's captions:",
        ),
    ),
    "train filter": (
        (
            "capfilt train filter runs/coco --init Salesforce/blip-itm-base-coco --output runs/mine/filter",
            "From a published filter:",
        ),
    ),
    "train albef": (
        (
            "capfilt train albef runs/mine --text-init google-bert/bert-base-uncased"
            " --vision-init facebook/deit-base-patch16-224 --output runs/mine/albef",
            "From BERT and DeiT, as the paper:",
        ),
    ),
    "train stage1": (
        (
            "capfilt train stage1 runs/mine --image-encoder openai/clip-vit-large-patch14"
            " --qformer-init google-bert/bert-base-uncased --output runs/mine/stage1",
            "On CLIP ViT-L/14, from BERT:",
        ),
        (
            "capfilt train stage1 runs/quickstart --image-encoder embedded --max-steps 50 --warmup-steps 5"
            " --output runs/quickstart/stage1",
            "The embedded models, to see it run:",
        ),
    ),
    "train stage2": (
        (
            "capfilt train stage2 runs/mine --init runs/mine/stage1 --llm facebook/opt-2.7b --output runs/mine/stage2",
            "After stage 1, with OPT:",
        ),
    ),
    "train blip2-captions": (
        (
            "capfilt train blip2-captions runs/coco --init Salesforce/blip2-opt-2.7b --output runs/coco/captions",
            "A published BLIP-2 on people's captions:",
        ),
    ),
    "train blip2-vqa": (
        (
            "capfilt train blip2-vqa --questions questions.json --annotations annotations.json --images train2014"
            " --init Salesforce/blip2-opt-2.7b --output runs/vqa",
            "A published BLIP-2 on VQAv2's files:",
        ),
    ),
    "train clip": (
        (
            "capfilt train clip runs/mine --tokenizer models/tokenizer --output runs/mine/clip --max-steps 1500",
            "A small one, from nothing:",
        ),
    ),
    "train llm": (
        (
            "capfilt train llm texts.jsonl --tokenizer models/tokenizer --architecture t5 --output models/t5",
            "A small T5:",
        ),
    ),
    "evaluate": (
        (
            "capfilt evaluate captions runs/mine/stage2 --references dataset_coco.json --images coco",
            "CIDEr, BLEU and ROUGE-L on Karpathy's test split:",
        ),
    ),
    "evaluate captions": (
        (
            "capfilt evaluate captions runs/mine/stage2 --references dataset_coco.json --images coco --split test",
            "A model on Karpathy's test split:",
        ),
        (
            "capfilt evaluate captions --results results.json --references captions_val2014.json",
            "A results file instead of a model:",
        ),
    ),
    "evaluate vqa": (
        (
            "capfilt evaluate vqa runs/mine/stage2 --questions questions.json --annotations annotations.json"
            " --images val2014",
            "A model's answers:",
        ),
    ),
    "evaluate retrieval": (
        (
            "capfilt evaluate retrieval runs/mine/blip/filter --references dataset_flickr30k.json"
            " --images flickr30k-images --k-test 128",
            "R@1, R@5 and R@10, the best 128 by ITC ranked again by ITM:",
        ),
    ),
    "evaluate filter": (
        (
            "capfilt evaluate filter runs/mine --labels labels.csv --target-precision 0.98",
            "A run's scores against your labels:",
        ),
        ("capfilt evaluate filter runs/quickstart --world", "A run of the miniature world against its truth:"),
    ),
    "generate": (
        ("capfilt generate runs/mine/stage2 photo.jpg", "A caption:"),
        ("capfilt generate runs/mine/stage2 photo.jpg --question 'What colour is the ball?'", "An answer:"),
        ("capfilt generate Salesforce/blip-image-captioning-large 'photos/*.jpg' --jsonl", "Of many, a line each:"),
    ),
    "explain": (
        (
            "capfilt explain Salesforce/blip-itm-large-coco photo.jpg 'a dog on a sofa' --output dog.png",
            "Where the filter sees each word:",
        ),
    ),
    "doctor": (
        ("capfilt doctor", "For people:"),
        ("capfilt doctor --json", "For a program:"),
    ),
}
"""Words of a command → command lines, each with what it is for. "" is capfilt itself."""

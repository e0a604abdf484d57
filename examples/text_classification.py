"""Fine-tune a text classifier, put it in order by what its channels are worth, and cut smaller ones out of it.

    python examples/text_classification.py
    python examples/text_classification.py --model FacebookAI/roberta-base --dataset fancyzhx/ag_news --max_steps 500

Without arguments all-MiniLM-L6-v2 learns the topics of Debian's fortunes; neither needs the Hub. The arguments of
TrainingArguments are arguments here. Prints a table, a line for each share of the neurons and heads that is kept: the
parameters, and the accuracy of the slice as it is cut and with its projections refitted on unlabelled texts, both
without more training:

    width     parameters     cut  refitted
    full      22,715,911   0.740
    half      17,399,431   0.735     0.735
    quarter   14,741,191   0.640     0.725
    text-classification-spp holds the checkpoint in order, and the widths half and quarter for load_subnetwork.
"""

from dataclasses import dataclass

import torch
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.hf_argparser import HfArg

from hf_spp import SPPCallback, SPPConfig, SubnetworkSpec, extract_subnetwork, save_width
from hf_spp.assets import fortunes, minilm
from hf_spp.comparison.metrics import classification_metrics


@dataclass
class Options:
    model: str | None = HfArg(
        default=None, help="Hub id or folder of a pretrained model; all-MiniLM-L6-v2 if not given."
    )
    dataset: str | None = HfArg(
        default=None, help="Hub id or folder of a data set; the topics of Debian's fortunes if not given."
    )
    text_column: str = HfArg(default="text", help="Column of the texts.")
    label_column: str = HfArg(default="label", help="Column of the classes.")
    max_length: int = HfArg(default=64, help="Most tokens of a text.")
    max_eval_samples: int = HfArg(default=200, help="Most examples to evaluate on.")


parser = HfArgumentParser((Options, TrainingArguments))
parser.set_defaults(
    output_dir="text-classification-spp",
    max_steps=40,
    per_device_train_batch_size=16,
    per_device_eval_batch_size=64,
    learning_rate=3e-4,
    logging_steps=10,
    report_to="none",
    dataloader_pin_memory=torch.cuda.is_available(),
)
options, args = parser.parse_args_into_dataclasses()
set_seed(args.seed)  # The new head is drawn here.

source = options.model or minilm()
tokenizer = AutoTokenizer.from_pretrained(source)
data = load_dataset(options.dataset) if options.dataset else fortunes()
labels = data["train"].features[options.label_column].names
tokens = data.rename_column(options.label_column, "labels").map(
    lambda rows: tokenizer(rows[options.text_column], truncation=True, max_length=options.max_length),
    batched=True,
    remove_columns=options.text_column,
)
model = AutoModelForSequenceClassification.from_pretrained(source, id2label=dict(enumerate(labels)))


def trainer_of(model, **more):
    return Trainer(
        model,
        args,
        train_dataset=tokens["train"],
        eval_dataset=tokens["test"].take(min(options.max_eval_samples, len(tokens["test"]))),
        processing_class=tokenizer,
        compute_metrics=classification_metrics,
        **more,
    )


def accuracy(model):
    return trainer_of(model).evaluate()["eval_accuracy"]


trainer = trainer_of(model, callbacks=[SPPCallback(SPPConfig(metric="taylor"), strategy="train_end")])
trainer.train()
trainer.save_model()

texts = tokens["train"].select(range(256))
batches = list(DataLoader(texts, batch_size=32, collate_fn=DataCollatorWithPadding(tokenizer)))
print(f"{'width':<8}{'parameters':>12}{'cut':>8}{'refitted':>10}")
print(f"{'full':<8}{model.num_parameters():>12,}{accuracy(model):>8.3f}")
for name, share in (("half", 0.5), ("quarter", 0.25)):
    spec = SubnetworkSpec.uniform(model, share)
    cut, refitted = extract_subnetwork(model, spec), extract_subnetwork(model, spec, calibration=batches)
    print(f"{name:<8}{cut.num_parameters():>12,}{accuracy(cut):>8.3f}{accuracy(refitted):>10.3f}")
    save_width(args.output_dir, name, refitted)
print(f"{args.output_dir} holds the checkpoint in order, and the widths half and quarter for load_subnetwork.")

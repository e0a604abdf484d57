r"""Run a slice of a reordered text classifier on the Hub, and download only the bytes that the slice needs.

    python examples/slice_from_hub.py --model ME/NAME [--width half] [--text "What to classify"]

`--width` is the name of a published width or a share such as 0.5. `examples/text_classification.py` makes such a
checkpoint, and `hf-spp push FOLDER ME/NAME` publishes it. Without a network, a Hub on this machine does as well:

    python tests/hub_server.py --repo me/fortunes=text-classification-spp -- \
        python examples/slice_from_hub.py --model me/fortunes

Prints what is downloaded, before it is, and what the slice says:

    60.8 MB of 90.9 MB are read for a slice of 60.7 MB (1.00 times its size), 60.5 MB of them from the Hub in 37 requests
    17,399,431 parameters
    food: 0.38
"""  # noqa: E501

from dataclasses import dataclass

from transformers import AutoTokenizer, HfArgumentParser, pipeline
from transformers.hf_argparser import HfArg

from hf_spp import load_subnetwork, plan_read


@dataclass
class Options:
    model: str = HfArg(help="Hub id or folder of a reordered checkpoint.")
    width: str = HfArg(default="half", help="A published width, or a share of the neurons and heads.")
    text: str = HfArg(default="The cook put garlic into the soup and tasted it again.", help="What is classified.")


(options,) = HfArgumentParser(Options).parse_args_into_dataclasses()
width = float(options.width) if options.width[0].isdigit() else options.width

print(plan_read(options.model, width))
small = load_subnetwork(options.model, width)
print(f"{small.num_parameters():,} parameters")

classify = pipeline("text-classification", model=small, tokenizer=AutoTokenizer.from_pretrained(options.model))
(answer,) = classify(options.text)
print(f"{answer['label']}: {answer['score']:.2f}")

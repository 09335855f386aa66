"""Makes tokenizer/: a small part of GR00T N1.5's tokenizer, and texts with the ids that the whole one gives them.

The whole tokenizer (Qwen's, Apache-2.0, with NVIDIA's image tokens) lies in Isaac-GR00T's folder eagle2_hg_model; the
checkout and the environment are those of make_nvidia_transforms.py. From the repository root:

    nvidia-venv/bin/python tests/golden/make_tokenizer_golden.py Isaac-GR00T/gr00t/model/backbone/eagle2_hg_model

vocab.json and merges.txt keep what the texts need, with the real ids and in the real order: all bytes, the added tokens,
and every merge that is applied on the way to one of the texts' tokens. A merge that the whole tokenizer prefers in one of
these texts is there, and no other can come before it, so these texts are split in the same way; other texts need not be.
The added tokens stand in vocab.json too: elsewhere they would be numbered from the end of the vocabulary.

texts.json: "texts", instructions; "ids", theirs within a prompt; "bracketed", the ids of the text as numpy prints an array
of it, which is how NVIDIA serves single observations; "before", what comes before the instruction with 1, 2 and 3 views,
<IMG_CONTEXT> once a view instead of 256 times; "after", what comes after it. The script checks that the tokenizer gives a
whole prompt these ids.
"""

import json
import sys
from pathlib import Path

import numpy as np
from safetensors import safe_open
from transformers import AutoTokenizer

PROMPT = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{}{}<|im_end|>\n<|im_start|>assistant\n"
VIEW = "<image {}><img>{}</img>"
IMAGE_TOKEN, REPEATS, VIEWS = "<IMG_CONTEXT>", 256, (1, 2, 3)

TEXTS = """
Perform the default behavior.
pick up the black bowl between the plate and the ramekin and place it on the plate
pick up the black bowl next to the cookie box and place it on the plate
pick up the alphabet soup and place it in the basket
pick up the tomato sauce and place it in the basket
pick up the cream cheese and put it in the tray
put both moka pots on the stove
turn on the stove and put the frying pan on it
open the top drawer of the cabinet and put the bowl inside
close the bottom drawer of the cabinet
put the wine bottle on the rack
push the plate to the front of the stove
stack the left bowl on the right bowl and place them in the tray
pick up the book and place it in the back compartment of the caddy
put the yellow and white mug in the microwave and close it
put the white mug on the left plate and put the chocolate pudding to the right of the plate
Stack the red block on the blue block, then stack the green block on the red block.
Lift the cube.
Lift the cube to the goal position
Reach the target pose with the end effector.
Pick up the red cube.
Pick up the red cube and put it into the blue bin
Place the cube at the marked spot
Push the T-shaped block onto the target
Insert the peg into the hole.
Mesh the gear with the others
Thread the nut onto the bolt
Open the drawer
Open the cabinet by its handle
Rotate the valve by 90 degrees clockwise.
Assemble the trocar: grasp both parts, align them, and push until they click.
Pass the scalpel handle-first to the surgeon's hand.
Hand over the syringe (capped!) to the nurse.
Sort the steering wheels: red into the box, blue onto the shelf
Follow the wall for 2.5 m, then turn left.
Walk forward at 0.8 m/s
Stand still; keep your balance.
pick the apple from the counter and place it in the sink
pick the sponge from the sink and place it on the counter
pick the lemon from the cutting board and place it in the bowl
pick the kettle from the stove and place it on the counter
open the left cabinet door
open the microwave door
close the right cabinet door
press the start button on the microwave
press the button to turn off the coffee machine
pick the mug from the counter and place it under the coffee machine dispenser
turn on the sink faucet
turn the sink spout to the right
turn on the front left burner of the stove
defrost the meat: put it in the sink and run water over it
wash the lettuce, dry it, and put it in a pan
set the table for 4 people
serve the croissant on a napkin
put the leftover soup in the fridge
restock the pantry with cans of beans, corn and chickpeas
load the dishwasher with the dirty plates
Slice the cucumber into 12 pieces
Crack 3 eggs into the bowl, please.
Whisk until smooth
Pour 250 ml of milk into the measuring cup.
Preheat the oven to 180 °C!
Is the kettle empty? If so, fill it.
Bring me the salt & pepper
Put 50% of the rice in each bowl
Buy-one-get-one: take the 2nd box
move coke can near orange
move the 7up can next to the sponge
pick rxbar chocolate from bottom drawer and place on counter
put carrot on plate
put the spoon on the towel
put eggplant into yellow basket
stack the green block on the yellow block
Fold the T-shirt in half, twice.
fold the towel
hang the jacket on the hook
zip up the backpack
unscrew the lid of the jar
screw in the light bulb
plug the USB-C cable into port #3
Type "hello" on the keyboard
Write 'OK' on the whiteboard with the marker
draw a circle around the letter B
Solve the puzzle: place piece no. 17
water the plants on the windowsill
feed the cat
Don't spill the coffee.
don't touch the robot's gripper
It's on the user's left; they'll hand it to you
We've moved the box, you're clear. I'd go now, I'm done!
Let's put the dog's toys into the children's room
The sign says "Don't push" - pull the door instead.
take the "blue" one, not the 'green' one
ROTATE THE WRIST
Grasp the HANDLE of the Mug
iPhone, MacBook and AirPods go into the grey drawer
use camera_left and then wrist_cam
task_42: reset()
gripper=open; speed=0.25; frame="base_link"
go to (x, y, z) = (0.45, -0.10, 1.2)
Go to waypoint A7/B12 @ 10:30
grab the object [if visible] {or wait}
pick up the cube -> place it -> return home
wait ... then go...
Stop!!! Really?!
one--two---three
cost: $12.99 + 7% tax
a*b^2 ~ c|d \\ e
C++ and C# books, please
see https://example.com/tasks?id=5#step-2
mail the form to robot@example.com
Pick item 1234567890
100 000 grains
3D-print the 2x4 brick
0.5
7
x
Go
Schließe die Tür und öffne das Fenster.
Räum die Spülmaschine aus, bitte!
Ramasse la tasse et pose-la près de l'évier.
Déplace le gâteau à côté de la crème brûlée
¿Puedes abrir el cajón de arriba?
Pon la piña en el tazón, ¡rápido!
Coloca a maçã no balcão
Metti il caffè sul tavolo
Włóż łyżkę do szuflady
Vezmi modrý hrnek
Подними красный кубик
把红色方块放到蓝色方块上
把杯子放进微波炉，然后关上门。
赤い立方体を持ち上げてください
カップをテーブルに置く
빨간 큐브를 집어 올리세요
ارفع المكعب الأحمر
הרם את הקובייה
लाल घन उठाओ
ยกลูกบาศก์สีแดง
Pick up the 🍎 and place it in the 🧺
👍 good job 🤖!
make a family 👨‍👩‍👧 photo
flag 🇩🇪 on the left
jalapeño, naïve café, Zoë’s façade
“smart quotes” and ‘single ones’ – with dashes — too…
½ cup of sugar, 20 µm, 5 Ω, x² + y³ ≠ z
№ 5 → bin ①
ﬁll the ﬂask
ＦＵＬＬ ｗｉｄｔｈ １２３
grasp the antidisestablishmentarianism-labelled supercalifragilistic jar
zxqj vwkp qqq brrrt
hmmmm aaaaaaaaaaaaaaaaaaaa
""".strip("\n").split("\n")

TEXTS += [  # what would be lost or unclear above
    " lift the cube", "lift the cube ", "  lift  the   cube  ", "lift the cube.  ", "lift\tthe\tcube", "\tlift the cube",
    "lift the cube\n", "\nlift the cube", "lift the cube\nplace it in the bin", "Step 1: reach.\n\nStep 2: grasp.\n",
    "1. open\r\n2. close", "lift \n the \n\n cube", "trailing tabs\t\t", "line one \nline two", "a\u00a0b no-break space",
    "wide\u3000space", "zero\u200bwidth", "cafe\u0301 with a combining accent", "n\u0303 and A\u030a", "soft\u00adhyphen",
    "C:\\tools\\bin", "quote \" and ' both", "'quoted'", '"quoted"', "'", "it''s", "ends with '", "['already bracketed']",
    "pick up the cup and place it on the shelf, then open the top drawer, take the fork, the knife and the spoon out of it, "
    "lay them beside the plate, close the drawer with the left hand, and return both arms to their rest position.",
]  # fmt: skip
with safe_open(Path(__file__).with_name("nvidia_transforms.safetensors"), framework="np") as golden:
    cases = json.loads(golden.metadata()["cases"])
TEXTS = list(dict.fromkeys([*TEXTS, *(case["instruction"] for case in cases)]))  # the other golden file's


def render(text: str, views: int) -> str:
    return PROMPT.format("".join(VIEW.format(view + 1, IMAGE_TOKEN * REPEATS) for view in range(views)), text)


def applied_merges(token: str, ranks: dict[tuple[str, str], int]) -> set[tuple[str, str]]:
    """The merges that lead from single bytes to a token. (Those within a token do not depend on its surroundings.)"""
    parts, applied = list(token), set()
    while len(parts) > 1:
        pair = min(zip(parts, parts[1:]), key=lambda pair: ranks.get(pair, len(ranks)))
        applied.add(pair)
        i, merged = 0, []
        while i < len(parts):
            both = tuple(parts[i : i + 2]) == pair
            merged.append("".join(pair) if both else parts[i])
            i += 1 + both
        parts = merged
    assert applied <= ranks.keys() and parts == [token]
    return applied


def main() -> None:
    source, target = Path(sys.argv[1]), Path(__file__).with_name("tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(source)  # no remote code: a class of transformers
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    assert len(set(TEXTS)) == len(TEXTS) and all(text.strip() for text in TEXTS)

    # ids of the parts, and that they are those of the whole
    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    head, tail = PROMPT.split("{}{}")
    before = [encode(head + "".join(VIEW.format(view + 1, IMAGE_TOKEN) for view in range(views))) for views in VIEWS]
    bracketed = [str(np.array([text])) for text in TEXTS]
    found = {"before": before, "after": encode(tail), "texts": TEXTS}
    found |= {"ids": [encode(text) for text in TEXTS], "bracketed": [encode(text) for text in bracketed]}
    for texts, ids in ((TEXTS, found["ids"]), (bracketed, found["bracketed"])):
        for text, own in zip(texts, ids):
            for views, start in zip(VIEWS, before):
                repeated = [i for i in start for _ in range(REPEATS if i == image_id else 1)]
                assert encode(render(text, views)) == repeated + own + found["after"], text

    # the part of the files that these need
    vocabulary = json.loads((source / "vocab.json").read_text())
    lines = (source / "merges.txt").read_text().splitlines()
    assert lines[0].startswith("#version")
    ranks = {tuple(line.split(" ")): rank for rank, line in enumerate(lines[1:])}
    names, added = {i: name for name, i in vocabulary.items()}, tokenizer.get_added_vocab()
    used = {i for ids in (*before, found["after"], *found["ids"], *found["bracketed"]) for i in ids} - set(added.values())
    merges = sorted(set().union(*(applied_merges(names[i], ranks) for i in used)), key=ranks.get)
    kept = {name for name in vocabulary if len(name) == 1 and vocabulary[name] < 256}
    assert len(kept) == 256
    kept |= {part for pair in merges for part in (*pair, "".join(pair))}
    config = json.loads((source / "tokenizer_config.json").read_text())
    for name in ("auto_map", "chat_template", "processor_class"):  # of the processor
        del config[name]
    files = {
        "vocab.json": {name: vocabulary[name] for name in sorted(kept, key=vocabulary.get)} | added,
        "merges.txt": "\n".join([lines[0], *map(" ".join, merges)]) + "\n",
        "added_tokens.json": added,
        "special_tokens_map.json": json.loads((source / "special_tokens_map.json").read_text()),
        "tokenizer_config.json": config,
        "texts.json": found,
    }
    target.mkdir(exist_ok=True)
    for name, content in files.items():
        compact = {"ensure_ascii": False, "separators": (",", ":")}
        text = content if isinstance(content, str) else json.dumps(content, **compact) + "\n"
        (target / name).write_text(text, encoding="utf-8")
        (target / name).chmod(0o644)
        print(f"{name}: {(target / name).stat().st_size / 1e3:.1f} kB")
    print(f"{len(TEXTS)} texts, {len(merges)} merges, {len(files['vocab.json'])} entries")

    again = AutoTokenizer.from_pretrained(target)
    for key, texts in (("ids", TEXTS), ("bracketed", bracketed)):
        assert [again(text, add_special_tokens=False)["input_ids"] for text in texts] == found[key]


if __name__ == "__main__":
    main()

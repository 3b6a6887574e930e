"""What the paper's Table 3 was measured on, and its numbers: FastComposer's subjects and prompts, as its
public code has them (github.com/mit-han-lab/fastcomposer, evaluation/; two people at commit 5282a7e)."""

# Identities of CelebA.
SUBJECTS = {"000001": "man", "000181": "man", "000268": "man", "000612": "woman", "000667": "woman",
            "001603": "woman", "001854": "man", "002088": "woman", "002464": "woman", "002782": "man",
            "002880": "woman", "002929": "woman", "002937": "woman", "003785": "man", "004153": "woman"}
IMAGES = 4  # of each subject and prompt, or of each pair and prompt
# Kind -> prompts, in which {} is `a man` ...
SINGLE = {
    "accessory": [f"{{}} {what}" for what in (
        "wearing a red hat", "wearing a santa hat", "wearing a rainbow scarf",
        "wearing a black top hat and a monocle", "in a chef outfit", "in a firefighter outfit",
        "in a police outfit", "wearing pink glasses", "wearing a yellow shirt", "in a purple wizard outfit")],
    "style": [
        "a painting of {} in the style of Banksy", "a painting of {} in the style of Vincent Van Gogh",
        "a colorful graffiti painting of {}", "a watercolor painting of {}", "a Greek marble sculpture of {}",
        "a street art mural of {}", "a black and white photograph of {}", "a pointillism painting of {}",
        "a Japanese woodblock print of {}", "a street art stencil of {}"],
    "action": [f"{{}} {what}" for what in (
        "riding a horse", "holding a glass of wine", "holding a piece of cake", "giving a lecture",
        "reading a book", "gardening in the backyard", "cooking a meal", "working out at the gym",
        "walking the dog", "baking cookies")],
    "context": [f"{{}} {where}" for where in (
        "in the jungle", "in the snow", "on the beach", "on a cobblestone street", "on top of pink fabric",
        "on top of a wooden floor", "with a city in the background", "with a mountain in the background",
        "with a blue house in the background", "on top of a purple rug in a forest")]}
# ... or `a man and a woman`. There is no table of these in the paper.
MULTI = {
    "style": [
        "a painting of {} together in the style of Banksy",
        "a painting of {} together in the style of Vincent Van Gogh",
        "a watercolor painting of {} together", "a street art mural of {} together",
        "a black and white photograph of {} together", "a pointillism painting of {} together",
        "a Japanese woodblock print of {} together"],
    "action": [f"a photo of {{}} {what} together" for what in (
        "gardening in the backyard", "cooking a meal", "sitting in a park", "working out at the gym",
        "baking cookies", "posing for a selfie", "making funny faces for a photo booth",
        "playing a musical duet")],
    "context": [f"a photo of {{}} together {where}" for where in (
        "in the jungle", "in the snow", "on the beach", "with a city in the background",
        "with a mountain in the background", "with a blue house in the background")]}
# Method -> (IP, PC)
TABLE3 = {"ELITE": (.228, .146), "DreamBooth": (.273, .239), "Custom-Diffusion": (.434, .233),
          "FastComposer": (.514, .243), "Subject-Diffusion": (.605, .228), "MoA, the paper": (.555, .202)}

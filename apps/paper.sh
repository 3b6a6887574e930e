#!/usr/bin/env bash
# The commands behind the paper's figures 3, 6-10 and 17-20 and the prompts of its Table 2.
#
#     apps/paper.sh OUTPUT [FLAGS for every command, such as --steps 4]
#     WEIGHTS=weights/sd15 MEN="a.jpg b.jpg c.jpg" WOMEN="d.jpg e.jpg" apps/paper.sh OUTPUT
#
# With WEIGHTS, Stable Diffusion 1.5 and MoA weights trained for it draw the paper's own prompts; MEN and
# WOMEN name photos, three and two at least, without spaces or quotes in their paths. Without it the small
# world draws the nearest prompts that its ninety words can say, with the people of examples/. The paper
# prints its prompts in Table 2 and names some in its text (Fig. 3, 7, 10, 18); where it names none or only
# a part (Fig. 6, 8, 9, 10, 18, 19, 20) the rest stands in here.
set -euo pipefail
if [ $# -lt 1 ] || [[ -z "$1" || "$1" == -* ]]; then
    echo "error: give the folder for the pictures: apps/paper.sh OUTPUT" >&2
    exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
output=$1
flags=("${@:2}" ${WEIGHTS:+--weights "$WEIGHTS"})
read -ra men <<< "${MEN:-$root/examples/max.png $root/examples/tom.png $root/examples/leo.png}"
read -ra women <<< "${WOMEN:-$root/examples/ada.png $root/examples/zoe.png}"
if [ ${#men[@]} -lt 3 ] || [ ${#women[@]} -lt 2 ]; then
    echo "error: MEN must name three photos and WOMEN two" >&2
    exit 2
fi
if ! mkdir -p "$output" 2> /dev/null || [ ! -w "$output" ]; then
    echo "error: $output cannot be made or written: give another folder for the pictures" >&2
    exit 2
fi

app() {  # NAME FIGURE ARGUMENTS...
    PYTHONPATH="$root" python -m "apps.$1" --output "$output/$2.png" "${@:3}" "${flags[@]}"
}

prompt() {  # THE_PAPER'S [THE_SMALL_WORLD'S]
    if [ -n "${WEIGHTS:-}" ]; then echo "$1"; else echo "${2:-$1}"; fi
}

line() {  # PROMPT PHOTO... -> a line of --from-file
    local subjects
    subjects=$(printf ', "man=%s"' "${@:2}")
    printf '{"prompt": "%s", "subjects": [%s]}\n' "$1" "${subjects#, }"
}

# Table 2, whose pairs stand for Fig. 8. The small world has no Van Gogh but pencils, no Eiffel Tower but
# Paris, no portraits, no saloon and no spaceship, and no words for quality.
high="very high quality, professional photo, beautiful lighting, 8k"
saloon="in the wild west, in front of a saloon, $high"
ship="on Mars, in front of spaceship, beautiful starry sky, $high"
vangogh=$(prompt "a man and a man in the style of Van Gogh painting" "a pencil drawing of a man and a man")
paris=$(prompt "a man and a man in Paris, shaking hands, with the Eiffel Tower in the background" \
    "a man and a man shaking hands in Paris")
cowboy=$(prompt "a portrait photo of a man dressed as a cowboy $saloon" \
    "a man dressed as a cowboy in the wild west")
spaceman=$(prompt "a close up portrait photo of a man dressed in a space suit without helmet, $ship" \
    "a man wearing a space suit on Mars")
racer=$(prompt "a portrait photo of a man as a race car driver, $high" "a man dressed as a race car driver")
{
    for pair in "$vangogh" "a man and a man sitting on a sofa" "a man and a man reading a book" "$paris" \
        "a man and a man standing on a mountain" "a man and a man running in a park" \
        "a man and a man in a lavender farm"; do
        line "$pair" "${men[0]}" "${men[1]}"
    done
    for single in "a man in a laboratory" "a man riding a bike" "$cowboy" "$spaceman" "$racer"; do
        line "$single" "${men[0]}"
    done
} > "$output/table2.jsonl"
python "$root/sample.py" --from-file "$output/table2.jsonl" --output "$output/table2" "${flags[@]}"

# Fig. 3 and 20: many seeds, beside the prior's.
app variations fig3 --prompt "a man riding a bike" --subject "${men[0]}" --seed 0 --num 8
app variations fig20 --prompt "a man reading a book" --subject "${men[1]}" --seed 0 --num 8

# Fig. 6: one seed, two pairs of people. Fig. 19: another seed.
app routing fig6a --prompt "$paris" --subject "${men[0]}" --subject "${men[1]}" --seed 0
app routing fig6b --prompt "$paris" --subject "${men[1]}" --subject "${men[2]}" --seed 0
app routing fig19 --prompt "$paris" --subject "${men[0]}" --subject "${men[1]}" --seed 1

# Fig. 7: one person, swapped.
app swap fig7a --prompt "a man drinking boba in a night market" --subjects "${men[@]}"
app swap fig7b --prompt "a woman holding a bouquet of roses" --subjects "${women[@]}"

# Fig. 9: one of two people swapped, then both.
pair="a man and a woman dancing in a park"
app swap fig9a --prompt "$pair" --keep "woman=${women[0]}" --subjects "${men[@]/#/man=}"
app swap fig9b --prompt "$pair" --subjects "man=${men[0]}+woman=${women[0]}" "man=${men[1]}+woman=${women[1]}"

# Fig. 10: two people at work. The small world does not cook.
pair=$(prompt "a man and a woman cooking in the kitchen" "a man and a woman reading a book in the snow")
app swap fig10 --prompt "$pair" --subjects "man=${men[0]}+woman=${women[0]}"

# Fig. 17: portraits in costumes.
app swap fig17a --prompt "$cowboy" --subjects "${men[@]}"
app swap fig17b --prompt "$spaceman" --subjects "${men[@]}"
app swap fig17c --prompt "$racer" --subjects "${men[@]}"

# Fig. 18: different bodies behind one word.
app swap fig18 --prompt "a person holding a bouquet of roses" --subjects "${men[@]}" "${women[0]}"

"""What the user gives to training, and what sampling gives back.

requests.py    a `Request` per trajectory, made from prompts or a folder of videos: what `prepare` is asked for
recipe.py      options and groups of target prompts from a recipe file
prompts.py     reads prompt files, and finds the tokens of the concept in a prompt
words.py       finds and replaces the concept in a text, and finds words that may be the concept in another form
videos.py      reads and writes video files
comparison.py  shows several videos next to each other, as one video or as a picture
"""

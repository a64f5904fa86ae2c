"""What the user gives to training, and what sampling gives back.

requests.py    a `Request` per trajectory, made from prompt files or a folder of videos: what `prepare` is asked for
prompts.py     reads prompt files, and finds the tokens of the concept in a prompt
words.py       finds the concept in a text, and words that may be the concept in another form
videos.py      reads and writes video files
comparison.py  shows several videos next to each other, as one video or as a picture
"""

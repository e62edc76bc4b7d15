"""The story grammar of `upcycling.worlds`, as text; `worlds.compile_template` explains the notation.

The hero's fixed facts are {h} (name), {he} {He} {his} {His} {him}, {kind}, {child}, {trait}, {toy}, {color}, {food}, {home},
{pet}, {petname}, {hobby}, {hobby0}, {hobbied}, {fear}, {job}; {f}, {f.he}, … are the hero's best friend.
"""

HERO_FORMS = ("{a trait} {kind} named {h}", "a little {kind} named {h} who was very {trait}")

CHARACTER_FACTS = (
    ("{He} lived in {home}.", "{h}'s home was {home}."),
    ("{His} favorite thing was {a color} {toy}.", "{h} had {a color} {toy} that {he} loved very much."),
    ("{h} loved to eat {food.s}.", "{His} favorite food was {a food}."),
    ("{He} had {a pet} named {petname}.", "{His} {pet} was called {petname}."),
    ("{h} was good at {hobby}.", "Every day, {he} went {hobby} with {f}.", "Most of all, {he} liked {hobby}."),
    ("{h} was afraid of {fear}.", "Only one thing scared {h}: {fear}."),
    ("{He} wanted to be {a job} one day.", "{h} dreamed of becoming {a job}."),
    ("{His} best friend was {a f.kind} named {f}.", "{h} and {f} were best friends."),
)

OPENING = """
[61:Once upon a time, [there was|there lived] |12:There was once |12:There was |8:Long ago, there was |7:One day, there was ]<hero>. <facts>
"""

LOST = """
[One day|One morning|That morning], {h} could not find {his} {color} {toy}. {He} looked [under the bed|behind the door|in every room]
and [in the garden|in the kitchen|at the {p=place}], but it was not there. [{h} was very sad.|{h} wanted to cry.]
[talk?"Have you seen my {toy}?" {he} asked {f}. "No," said {f}, "but I will help you look for it."
|{h} told {f} about it, and {f} promised to help.]¶
They [walked|ran|went] to the {p2=place}. There they met {a q=quality} {x=animal}. [The {x} was holding something.|The {x} looked at them.]
[talk?"Is this your {toy}?" asked the {x}. "I found it near {a pl=plant}." "Yes! Thank you so much," said {h}.
|The {x} had found the {toy} near {a pl=plant} and gave it back.]
[To say thank you, {h} gave the {x} {a food}.|{h} was so happy that {he} gave the {x} {a food} and {a y=food!}.]¶
"""

HURT = """
[One day|One sunny day|One afternoon], {h} and {f} [were {g=doing} at|were walking to|went to] the {p=place}. [Suddenly|Then], they heard a
[small|strange|sad] [sound|cry|voice]. Under {a pl=plant} lay {a x=animal}. Its [leg|foot|back|nose] was hurt.
[talk?"Please help me," said the {x}. "Don't be afraid," said {h}. "We will take care of you."|The {x} could not walk and {h} felt sorry for it.]¶
{h} [ran home and came back with|took from {his} bag] {a t=thing} and {a y=food}. {f} [held|hugged|talked to] the {x} while {h} [washed|cleaned|looked at] the
[cut|sore place]. [Every day|For a week|For many days] they [visited|fed] the {x}, and {h} brought [a blanket|some water|{a q=quality} {t2=thing!t}].
[talk?"You are so {tr=trait}," said the {x}. "I will never forget you."|The {x} looked much better.]¶
"""

RACE = """
The {p=place} held a big [contest|game] every year. The prize was {a q=quality} {t=thing}. {h} wanted to win it, but {he} could not
{d=do} very well. [talk?"I will never win," said {h}. "Then we will practice," said {f}. "I can teach you."|{f} offered to help {him} practice.]¶
[Every morning|Every day after school|Each evening], they practiced [at the {p2=place}|near the {p2=place}]. [At first|In the beginning], {h} fell [down|over] and
[dropped {his} {toy}|bumped into {a x=animal}|hurt {his} knee]. But {he} [tried again|did not give up|kept going].¶
[On the big day|When the day came|At last the day came], {h} was [nervous|excited|ready]. {A y=animal} and {a j=job} [came to watch|cheered for everyone].
{h} did {his} best. [{He} won the {t}, and {f} clapped.|{He} did not win, but {he} was proud.|{f} won the {t} and shared it with {h}.]
[talk?"[I am proud of you|You did so well|That was great]," said {f}.|They smiled at each other.]¶
"""

BAKE = """
It was the birthday of {f}. {h} wanted to [bake|make] {a q=food} cake for {f.him}. {He} needed [some eggs|some flour|some milk], {a y=food} and
[two|three|four|five] {z.s=food!y}. [So {he} went to the market and bought them from {a j=job}.|{A j=job} gave {him} all of it.]¶
But when the cake was [ready|done|in the oven], {petname} the {pet} [jumped on the table|ran through the kitchen|wanted to taste it] and the cake fell
[on the floor|into the sink|out of the window]. [talk?"Oh no!" cried {h}. "What can I give {f} now?" "Give {f.him} something of your own," said the {j}.
|{h} sat down and thought about it.]¶
Then {h} had an idea. {He} took {a t=thing}, painted it {c=color} and put {a u=thing!t} inside. {f} [opened it|looked at it] and [smiled|laughed|jumped for joy].
[talk?"This is the best gift ever," said {f}.|It was the best gift of all.]¶
"""

ENDING = """
[From that day on, {h} and {f} [were never apart|shared everything|went {g9=doing} together]|
And they all [lived happily ever after|had a good time|were friends]|
That night, {h} [slept well|dreamed of {a n9=animal}|told {his} [mother|father|grandmother] the whole story]|
{h} learned that [friends help each other|it is good to share|trying again is worth it|being {t9=trait} is not enough]|
After that, {h} was never afraid of {fear} again].
"""

PLOTS = (LOST, HURT, RACE, BAKE)
STORY = f"{OPENING.strip()}[!talk 65][{'|'.join(plot.strip() for plot in PLOTS)}]{ENDING.strip()}"

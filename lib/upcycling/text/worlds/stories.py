"""The story grammar of `upcycling.worlds`, as text; `worlds.compile_template` explains the notation.

Facts of the hero, always true of that character: {h} name, {he} {He} {his} {His} {him}, {kind}, {trait}, {color}
{toy}, {food},
{town}, {home}, {pet} {petname}, {hobby} {hobby0} {hobbied}, {fear}, {job}. {m}, {m.he}, …: an adult the hero knows.
{f}, {f.he}, {f.food}, …: the hero's best friend, a character with the same facts. {n}, …: another one, who comes in
at <other>.
"""

HERO_FORMS = (
    "{a trait} {kind} named {h}",
    "a little {kind} named {h} who was very {trait}",
    "a {kind} called {h}. Everybody said that {h} was {trait}",
)

# Each character has one of each; a story tells two to four of them.
CHARACTER_FACTS = (
    ("{He} lived in {home}.", "{h}'s home was {home}.", "{h} and {his} family lived in {home}."),
    ("{h} came from {town}.", "{He} was born in {town}."),
    ("{His} favorite thing was {a color} {toy}.", "{h} had {a color} {toy} that {he} loved very much."),
    ("{h} loved to eat {s food}.", "{His} favorite food was {a food}."),
    ("{He} had {a pet} named {petname}.", "{His} {pet} was called {petname}."),
    ("{h} was good at {hobby}.", "Most of all, {he} liked {hobby}."),
    ("{h} was afraid of {fear}.", "Only one thing scared {h}: {fear}."),
    ("{He} wanted to be {a job} one day.", "{h} dreamed of becoming {a job}."),
    ("{His} best friend was {a f.kind} named {f}.", "{h} and {f} were best friends."),
    ("{His} teacher was {m}.", "At school, {he} sat in the class of {m}."),
)

OPENING = """
[610:Once upon a time, [there was|there lived]|90:There was once|100:There was|100:Long ago, there was|100:One day,
there was]
<hero>. <facts>
"""

SCENE = """[One day|One {w=weather} morning|One {w=weather} afternoon|One {w=weather} evening|On {a w=weather} day|On
{w=weekday}|One {w=weather} day]"""

LOST = """
<scene>, {h} could not find {his} {color} {toy}. {He} looked [under the bed|behind the door|in every drawer|on the
shelf],
[in the garden|in the kitchen|in the attic] and [even |]at the {p=place}, but it was not there. {He} felt {u=sad} and
[sat down on the {s1=house}|hugged {petname} the {pet}|went to see {f}].¶
[talk?"Have you seen my {toy}?" {h} asked. "No," said {f}, "but I will help you look for it. Let's go to the
{p2=place!p}."
|{f} saw how {u} {he} was and [promised to help|offered to go with {him} to the {p2=place!p}].]
They [walked|ran|hurried|went] past [the |some ]{sc=scenery} and [the |many ]{sc2=scenery!sc}. There they met {a
q=beast} {x=animal},
and beside it lay [something {color}|something under {a pl=plant}].¶
[talk?"Is this your {toy}?" asked the {x} {ad=adverb}. "I found it near the {p3=place!p}." "Yes, that is my {toy}!"
said {h}. "Thank you!"
|It was the {toy}! The {x} had found it near the {p3=place!p} and gave it back {ad=adverb}.]
[{h} gave the {x} {a food} to say thank you|To thank the {x}, {h} and {f} shared their {s y=food} with it
|{h} was so {v=glad} that {he} danced with the {x}].
[After that, {he} always put the {toy} [back in its place|in {a m1=material} box]|
The {toy} was only a bit [dusty|wet|scratched]].
"""

HURT = """
<scene>, {h} and {f} [were {g=doing} near the {p=place}|were walking home from the {p=place}|played {g1=game} at the
{p=place}].
[Suddenly|All at once|Then], they heard a {so=sound}. [Under|Behind|Beside] {a pl=plant} lay {a q=beast} {x=animal}.
Its {b=limb} was hurt, and it looked {u=sad}.¶
[talk?"Please help me," said the {x}. "Don't be afraid," said {h} {ad=adverb}. "We will take care of you."
|The {x} could not walk, and {h} felt sorry for it.]
{h} [ran home and came back with|took out of {his} bag] {a t=thing} and {a y=food}. {f} [held|hugged|calmed] the {x}
while {h}
[washed|cleaned|looked at] the {b}. [Then {m} came and [showed them what to do|tied a piece of {m1=material} around
it]|They made a bed out of {m1=material}].¶
[Every day|For a week|For many days], they [visited|fed] the {x} and brought it {s y2=food!y}. [Soon|Little by
little|At last], it was strong again.
[talk?"You are so {tr=good}," said the {x}. "I will never forget you." Then it {di=moved} away {ad2=adverb}.|It
{di=moved} around the {p} {ad2=adverb}.]
[{h} and {f} waved until it was gone|Sometimes, it came back to visit them at the {p2=place!p}].
"""

CONTEST = """
Every year, there was a big contest at the {p=place}. The prize was {a q=quality} {t=thing} made of {m1=material}. {h}
wanted to
win it, but {he} could not {d=do} very well.
[talk?"I will never win," said {h}. "Then we will practice," said {f}. "I can teach you to {d}."|{f} offered to help
{him} practice.]¶
[Every morning|Every day after school|Each evening], they practiced [at|near] the {p2=place!p}. [At first|In the
beginning],
{h} [fell down|hurt {his} [knee|elbow|thumb|ankle]|bumped into {a x=animal}] and felt {u=sad}. But {he} [tried
again|did not give
up|kept going],
and [each day|little by little] it got [easier|better].¶
[On {w=weekday}|When the big day came|At last], many {s j0=job} and {s j1=job!j0} came to watch. There was {a
j=job!j0} with {a t2=thing!t},
and [even |]{m} was there.
{h} did {his} best. [{He} won the {t}, and {f} clapped {ad=adverb}|{He} did not win, but {he} felt {v=glad}|{f} won
the {t} and shared it with {h}].
[talk?"{ex=exclamation}! [I am proud of you|You did so well|That was wonderful]," said {f}.|They smiled at each other.]
[Afterward|To celebrate], they ate {me=meal} [and|with] {s food}.
"""

BIRTHDAY = """
It was {f}'s birthday. {h} wanted to [bake|make] {a k=food} cake for {f.him}. {He} needed [some eggs|some flour|some
milk|some honey],
{a y=food} and [two|three|four|five|six|seven] {s z=food!y}.
[{He} went to the market and bought them from {a j=job}|{m} gave {him} all of it in {a q=quality} basket|{He} found it
all in the kitchen].¶
But when the cake was [ready|done], {petname} the {pet} [jumped on the table|ran through the kitchen|wanted to taste
it], and with a
[loud|big] {so=sound} the cake fell [on the floor|into the sink|out of the window]. {h} was {u=sad}.
[talk?"Oh no!" {he} cried. "What can I give {f} now?" "Give {f.him} something that you made yourself," said [{m}|{his}
mother|{his} grandfather].
|{He} sat down and thought about it for a long time.]¶
Then {h} had an idea. {He} took {a t=thing}, painted it {c=color}, and put {a t2=thing!t} and {a fi=find} inside. {f}
opened it {ad=adverb} and
[smiled|laughed|jumped for joy]. [talk?"{ex=exclamation}! [This is the best gift ever|What a lovely {t}|I will keep it
forever]," said
{f}.|It was the best gift of all.]
Then {f}'s mother brought {me=meal} and {s f.food} for everyone, and they played {g=game} until [bedtime|it got
dark|the moon came
up].
"""

NIGHT = """
<scene>, {h} was [at home|in bed|in {his} room] when [the lights went out|a storm came|there was a loud {so=sound}].
{He} felt {u=sad}. All {he} could
think of was {fear}. {He} held {his} {toy} and hid [under the blanket|behind the {s1=house}|inside a cupboard].¶
[talk?"Who is there?" {he} asked {ad=adverb}. "It's only me," said {f}. "I brought {a t=thing} and {a y=food}. Let's
be brave together."
|Then {f} came in with {a t=thing} and {a y=food}, and {h} was not alone anymore.]
They [told each other stories|counted to a hundred|made shadows on the wall|built a tent out of {m1=material}], and
{f} [told a story about {s j0=job} and|sang a song about {s t0=thing!t} and]
{a q=beast} {x=animal} who was [also |]afraid of {fear}.¶
In the story, the {x} met {a j=job}, who gave it {a t2=thing!t}. [With it, the {x} could {d=do} without any fear|After
that, the {x} was never afraid again].
[talk?"I want to be like the {x}," said {h}. "You already are," said {f}.|{h} wanted to be just like the {x}.]
[In the morning|When the sun came up|Soon], [the storm was over|everything was quiet|the sky was clear], and they went
out to {d2=do} near the {p=place}.
"""

SHARE = """
<scene>, {h} and {f} found {a q=quality} {t=thing} at the {p=place}. Both of them wanted it. [{h} pulled on one side
and {f} on the other|They ran around and
shouted|{h} hid it behind {his} back].
[talk?"I saw it first!" said {h}. "No, it is mine!" said {f}.|They argued until both of them were {u=sad}.]¶
[{A j=job} heard them and came over|{m} heard them and came over|{A q2=beast} {x0=animal} was watching them].
[talk?"Why don't you take turns?" said a calm voice. "[On {w=weekday}|First], {h} can have it, and then it is {f}'s
turn."
|Soon they understood that they could take turns.] {h} thought about it {ad=adverb}. [It was a good idea|{He}
remembered how {f} had once given {him} {a y=food}
|{He} did not want to lose {his} best friend].¶
So [they used the {t} together|{h} gave the {t} to {f}|{f} let {h} have the {t} first]. They played {g=game} with it
and pretended to be {s j2=job} who {ch=chore} [and|or] {s j3=job!j2} who {ch2=chore!ch}.
[talk?"I am sorry," said {h}. "Me too," said {f}. "It is more fun to share."|It was much more fun that way.]
[Later|In the evening], they ate {me=meal}, {s food} and {s f.food} and felt {v=glad}.
"""

BROKEN = """
<scene>, {h} was playing {g=game} in the house of {m}. {He} knew that this was not allowed. [Suddenly|Then], {he}
bumped into
the {s1=house}, and {a q=quality} {t=thing} made of
{m1=material} fell down with a {so=sound}. It was broken.¶
{h} felt {u=sad}. [{He} thought about hiding it under the {s2=house!s1}|{He} wanted to run away|{He} wanted to say
that {petname} the {pet} had done it].
[talk?"What should I do?" {he} asked {f}. "Tell the truth," said {f}. "I will come with you."|But {f} told {him} to
say what had really happened.]
So {he} [walked|went] to {m} {ad=adverb} and showed {m.him} the {t}.¶
[talk?"I broke it," said {h}. "I am sorry." "Thank you for telling me," said {m}. "That was {tr=good} of you."|{m} was
not angry, because {h} had told the truth.]
Together they [mended it with glue|made a new one out of {m2=material!m1}|painted the pieces {c=color}], and {h}
[helped|worked] in the {p=place} for
[two|three|four] days. In the end, {m} gave {him} {a y=food}, and {he} felt {v=glad}.
"""

FOREST = """
<scene>, {h} saw {a q=beast} {x=animal} with {a t=thing} [in its mouth|on its back|on its head]. {He} was curious and
followed it past [the |some ]{sc=scenery},
over the {p=place} and into the woods. [Soon|After a while], the {x} was gone, and {h} did not know the way home.¶
It got [dark|cold|late]. {h} heard a {so=sound} and thought of {fear}. {He} felt {u=sad}.
[talk?"Is anybody there?" {he} called. "Yes," said a [soft|deep|friendly|gentle|warm] voice. It was {a j=job} with {a
t2=thing!t}. "I will
take you home."
|Then {a j=job} with {a t2=thing!t} came along the path and saw {him}.]
The {j} gave {him} {a y=food} and [a cup of tea|a warm coat|some {me=meal}], and they followed the [light|smell of {s
y2=food!y}|stars] [together|{ad=adverb}].¶
At the edge of the woods, {f} was waiting with {petname} the {pet}, {s t3=thing!t} and {s y3=food}.
[talk?"I looked for you everywhere," said {f}. "[Never do that again|I was so worried|I am glad you are safe]."|{f}
had looked for {him} everywhere.]
{h} thanked the {j} and let the {j} have {his} {color} {toy} for a day. [That night|At home], {he} drew a picture of
the {x} and hung it over the {s1=house}.
"""

TRADE = """
<scene>, {h} went to the market in {town} with {a t=thing} that {he} did not need. {He} really wanted {a t9=thing!t}.
{He} passed stalls full of {s t8=thing!t9} and {s y8=food}. First {he} met {a j=job}. [talk?"I need {a t}," said the
{j}. "I can give you {a y=food} and {a q=quality} {t3=find}
for it."
|The {j} needed {a t} and gave {him} {a y=food} and {a q=quality} {t3=find} for it.]¶
Then {he} met {a j2=job!j}, who was hungry. {h} gave the {j2} the {y}, and got {a c=color} ribbon. Last of all came {a
q2=beast} {x=animal}. It wanted the {t3}, because it
was [building a house|making a present for its mother|collecting them].
[talk?"If you give me the {t3}," it said {ad=adverb}, "you can have my {t9}."|It offered its {t9} for it.]¶
So {h} [walked|ran|skipped] home with the {t9}. {f} could not believe it. [talk?"{ex=exclamation}! You left with {a t}
and came back
with {a t9}!" said {f}. "How did you do that?"
|{He} had left with {a t} and come back with {a t9}.] {h} [laughed|smiled|shrugged]. Then the two of them played with
the {t9} [all day|until dinner|until
{w=weekday}], and {he} felt {v=glad}.
"""

GARDEN = """
<scene>, {m} gave {h} {a q=quality} seed. {He} planted it behind the {s1=house}, near {a pl=plant}, and [watered it
every day|gave it water and light|sang to it].
For a long time, nothing happened. [talk?"Maybe it is asleep," said {f}. "Let's wait until {w=weekday}."|{f} told
{him} to wait.]¶
Then something {c=color} came out of the soil. It grew and grew, [higher than|as high as] the {p=place}. On it
hung {s y=food}, {s y2=food!y} and even {a t=thing}.
[{A x=animal} and {a x2=animal!x} came to look at it|Many {s x=animal} came to live in it|{A q2=beast} {x=animal}
climbed to the top].
[talk?"{ex=exclamation}! [What a strange plant|How wonderful|I have never seen this before]!" said {a j=job} who
walked by.|{A j=job}
who walked by could not believe it.]¶
{h} could not eat all of it alone. So {he} {ad=adverb} picked the {s y} and [gave them to everyone in {town}|made a
big pie for everyone in {town}|sold them at the market].
[talk?"Take as many as you like," said {h}.|Everyone could take as many as they liked.] {f} took [two|three|ten] of
them home.
In the autumn, the plant left one small seed, and {h} kept it beside {his} {color} {toy}.
"""

JOB = """
<scene>, {h} met {a job} at the {p=place}. {He} had always wanted to be one, so {he} asked [if {he} could help|many
questions|to see how it is done].
[talk?"Come with me," said the {job}. "But first you need {a t=thing}."|The {job} let {him} carry {a t=thing}.]
There were {s t0=thing!t} and {s p0=plant} everywhere. In the morning, they {ch=chore} and {ch2=chore!ch}. [Then|After
that], they {ch3=chore!ch2}.¶
It was not [easy|simple]. {h} [got tired|hurt {his} [knee|elbow|thumb|ankle]|lost the {t}], and {a q=beast} {x=animal}
[laughed
at|looked at|ran after] {him}. {He} felt {u=sad}.
[talk?"Should I give up?" asked {h}. "[Everybody makes mistakes|I was slow at first, too|Try once more]," said the
{job} {ad=adverb}.|But the {job} was {tr=good} and showed {him}
again.]¶
In the evening, {he} could do it all alone. The {job} gave {him} {a q2=quality} {t2=thing!t} made of {m1=material}.
{h} ran to {f} and told {f.him} everything.
[talk?"One day, you will be {a job}," said {f}, "and I will be {a f.job}."|{f}, who wanted to be {a f.job}, listened
{ad2=adverb}.]
They ate {me=meal} with {s food} and talked until [it was dark|bedtime|the stars came out].
"""

NEIGHBOR = """
<scene>, a new family moved into the house next to the {p=place}. {h} saw a child sitting alone on the {s1=house}. The
child's name was <other>.
[talk?"Hello, I am {h}," said {h}. "What do you like?" "I like {n.hobby}," said {n}, "and {s n.food}."|{h} learned
that {n} liked {n.hobby} and {s n.food}.]¶
{n} came from {n.town} and was afraid of {n.fear}. {n.He} had {a n.color} {n.toy} and {a n.pet} named {n.petname}. {h}
showed {n.him} {his} own {toy} and {petname} the {pet}.
[Then|After that], the two children and {f} played {g=game} [until it got dark|near the {p2=place!p}|with {a q=beast}
{x=animal}].¶
[At first, {n} was very quiet|At first, {f} was a little jealous|At first, they did not know what to say]. But
[soon|after a while] they all {di=moved} around {ad=adverb} and [laughed|felt {v=glad}].
[talk?"[Will you come back tomorrow|Can I sit next to you at school|Do you want to see my room]?" asked {n}. "Of
course," said {h}.|{n} asked them to come back soon.]
[On {w2=weekday}|A week later], {n} gave {h} {a q2=quality} {t=thing} and {f} {a fi=find}.
"""

PET = """
<scene>, {h} opened the door, and {petname} the {pet} ran away. {He} called and called, but {petname} did not come
back. {h} and {f} looked
behind the {s1=house}, under {a pl=plant} and at the {p=place} and asked {a j=job}, who {ch=chore} nearby.
[talk?"I saw {a pet} near the {p2=place!p}," said the {j}. "It was chasing {a x=animal}."|The {j} had seen {a pet}
near the {p2=place!p}, chasing {a x=animal}.]¶
They ran there as fast as they could. They saw {sc=scenery} and {sc2=scenery!sc}, but no {pet}. {h} felt {u=sad}.
[Then|At last], {f} had an idea.
[talk?"Let's put {a y=food} on the ground and wait," said {f} {ad=adverb}.|They put {a y=food} on the ground and
waited {ad=adverb}.]
[Soon|After an hour|When it was almost dark], there was a {so=sound} and {petname} came out of [the bushes|a hole|an
old barrel].¶
{petname}'s {b=limb} was [dirty|wet|full of mud], and {a t=thing} was [tied to|hanging from] it. {h} laughed and
hugged {petname}.
[talk?"Where did you get that {t}?" asked {h}. "I think it belongs to {m}," said {f}.|The {t} belonged to {m}.] So
they all went to {m} and gave it back. {m.He} was so {v=glad} that {m.he} gave them {me=meal} and {s y2=food!y}.
"""

TREASURE = """
<scene>, {f} found an old map inside {a q=quality} {t=thing}. [It showed|On it was] the way to a treasure near the
{p=place}. {h} packed {a t2=thing!t}, {a t3=thing!t2} and some {s y=food}.
[talk?"Let's go," said {h}. "But what if we meet {a x=animal}?" asked {f}. "Then we will {d=do} and run."|They were a
little nervous, but they went anyway.]¶
First they went past {sc=scenery}. Then they turned [left|right] at {a pl=plant} and counted [twenty|thirty|fifty|a
hundred] steps. [There was a big {m1=material} door|There was a deep hole|They saw a tower of {m1=material}]
and before it sat {a q2=beast} {x2=animal}.
[talk?"Answer my riddle," said the {x2}. "What is {c=color} and can {d2=do}?" {h} thought {ad=adverb} and said, "{A
x3=animal} with {a t4=thing!t3}!"|The {x2} let them pass because {h} gave it {a y2=food!y}.]¶
Behind it stood a box. Inside there was no gold, only {a q3=quality} {t5=thing}, {a fi=find} and a letter from {m}.
[talk?"The real treasure is the way," {f} read.
|The letter said that the real treasure was the way.] [{h} was a bit {u=sad} at first, but then {he} laughed|Both of
them felt {v=glad}].
They shared the last of the {s y} and {di=moved} home {ad2=adverb}.
"""

ENDING = """
[¶|2: ][From that day on, {h} and {f} [were never apart|shared everything|went {g9=doing} every {w9=weekday}]|
And they all [lived happily ever after|had a good time|stayed friends]|
That night, {h} [slept well|dreamed of [{s n9=animal}|{s n9=thing}|{s n9=plant}|{s n9=job}]|told {his}
[mother|father|grandmother] the whole story]|
2:<moral>].
"""

# Each plot with what is learned from it.
PLOTS = (
    (LOST, "{h} learned that [friends help each other|two pairs of eyes see more than one]"),
    (HURT, "{h} learned that [kindness is never forgotten|even small animals need a friend]"),
    (CONTEST, "{h} learned that [you should never give up|practice is more important than luck]"),
    (BIRTHDAY, "{h} learned that [the best gifts come from the heart|a mistake can become something good]"),
    (NIGHT, "After that, {h} was not so afraid of {fear} anymore"),
    (SHARE, "{h} learned that [it is good to share|a friend is worth more than {a t9=thing}]"),
    (BROKEN, "{h} learned that [it is always best to tell the truth|honesty takes courage]"),
    (FOREST, "{h} learned that [you should not walk away alone|strangers can be helpful]"),
    (TRADE, "{h} learned that [everything is worth something to somebody|it pays to ask]"),
    (GARDEN, "{h} learned that [good things need time|there is always enough to share]"),
    (JOB, "{h} learned that [nobody is born {a job}|hard work can be fun]"),
    (NEIGHBOR, "{h} learned that [a stranger can become a friend|it is easy to say hello]"),
    (PET, "{h} learned that [patience is better than shouting|one should always close the door]"),
    (TREASURE, "{h} learned that [the way is the real treasure|it is good to be curious]"),
)

STORY = (
    OPENING.strip()
    + "[!talk 65]["
    + "|".join(plot.strip() + ENDING.strip().replace("<moral>", moral) for plot, moral in PLOTS)
    + "]"
).replace("<scene>", SCENE)

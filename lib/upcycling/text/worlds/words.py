"""English word lists from which `upcycling.worlds` writes its texts: nouns by kind, adjectives, verbs, names."""


def _list(text: str) -> tuple[str, ...]:
    """Split a list at its commas; each word once, in the order written."""
    return tuple(dict.fromkeys(word.strip() for word in text.replace("\n", " ").split(",") if word.strip()))


# Things a child can carry, lose, find, share or break.
THINGS = _list("""
ball, kite, doll, drum, bell, book, map, key, lamp, lantern, candle, mirror, clock, whistle, flute, trumpet, violin,
guitar,
puppet, marble, puzzle, robot, rocket, boat, wagon, scooter, bicycle, basket, bucket, bottle, box, bag, purse, wallet,
coin,
ring, necklace, bracelet, crown, medal, ribbon, button, needle, thimble, spool, blanket, pillow, umbrella, hat, cap,
scarf,
mitten, glove, coat, jacket, sweater, shirt, dress, skirt, apron, belt, sock, shoe, boot, slipper, pencil, pen,
crayon, brush,
notebook, letter, postcard, stamp, envelope, ticket, picture, painting, photograph, camera, telescope, magnet,
compass, shovel,
rake, hammer, saw, ladder, rope, chain, hook, net, spoon, fork, bowl, plate, cup, mug, jug, kettle, teapot, pan, pot,
jar, vase,
tray, towel, comb, sponge, mop, broom, balloon, bead, domino, card, toy, truck, train, tractor, airplane, helicopter,
submarine, castle, tent, flag, mask, wand, cape,
shield, sword, bow, arrow, anchor, paddle, oar, wheel, spring, bolt, screw, battery, flashlight, radio, telephone,
calendar,
diary, dictionary, banner, poster, sticker, badge, locket, brooch, thread, ruler, eraser, globe, hourglass, suitcase,
backpack,
hammock, cushion, carpet, curtain, quilt, trophy, yo-yo, spinning top, jigsaw, tambourine, harp, horn, piano,
accordion, banjo,
fiddle, cymbal, rattle, teddy bear, toy car, toy boat, music box, snow globe, paper crane, wooden horse, rag doll,
jump rope,
monocle, thermos, canteen, lasso, boomerang, ukulele, xylophone, harmonica, saxophone, clarinet, tuba, cello, trombone,
bagpipe, gong, triangle, maraca, stethoscope, microscope, calculator, typewriter, toaster, blender, kaleidoscope,
periscope, parachute, snorkel, skateboard, surfboard, snowboard, sleigh, tricycle, pogo stick, seesaw, slingshot,
pinwheel, windsock, weathervane, birdhouse, wind chime, figurine, scarecrow, chess set, frisbee, hula hoop, racket,
helmet, vest, bonnet, beret, turban, tiara, poncho, kimono, bathrobe, sandal, sneaker, bookmark, paperclip, stapler,
sundial, barometer, thermometer
""")
# What one may pick up outdoors.
FINDS = _list("""
feather, shell, pebble, stone, crystal, acorn, pinecone, leaf, stick, bubble, twig, nest, seashell, icicle, snowflake,
footprint
""")
ANIMALS = _list("""
cat, dog, rabbit, mouse, fox, bear, wolf, deer, squirrel, hedgehog, badger, otter, beaver, mole, hamster, guinea pig,
pony,
horse, donkey, cow, calf, sheep, lamb, goat, pig, piglet, hen, rooster, chick, duck, duckling, goose, swan, turkey,
pigeon,
sparrow, robin, crow, owl, eagle, hawk, parrot, penguin, peacock, seagull, pelican, stork, heron, frog, toad, newt,
lizard, snake,
turtle, tortoise, crocodile, fish, salmon, goldfish, shark, whale, dolphin, seal, walrus, octopus, crab, lobster,
snail, worm,
beetle, ladybug, butterfly, caterpillar, bee, ant, spider, cricket, dragonfly, firefly, grasshopper, moth, bat,
monkey, gorilla,
elephant, giraffe, zebra, lion, tiger, leopard, panda, kangaroo, koala, camel, llama, hippo, rhino, puppy, kitten,
raccoon,
skunk, chipmunk, porcupine, weasel, moose, bison, ostrich, flamingo, woodpecker, hyena, jackal, mongoose, meerkat,
armadillo,
sloth, anteater, lynx, panther, cheetah, jaguar, antelope, gazelle, reindeer, yak, alpaca, ferret, stoat, vole, lemur,
chameleon, iguana, gecko, salamander, alligator, jellyfish, starfish, squid, shrimp, trout, herring, eel, stingray,
toucan,
canary, finch, wren, magpie, puffin, albatross, cuckoo
""")
FOODS = _list("""
apple, pear, peach, plum, cherry, grape, orange, lemon, lime, banana, mango, melon, strawberry, raspberry, blueberry,
blackberry, fig, date, apricot, coconut, pineapple, carrot, potato, tomato, onion, cucumber, pepper, pumpkin, turnip,
radish,
cabbage, lettuce, mushroom, bean, pea, olive, walnut, almond, peanut, cookie, biscuit, cake, cupcake, muffin, pancake,
waffle,
pie, tart, doughnut, bun, roll, bagel, pretzel, sandwich, dumpling, noodle, sausage, egg, omelet, burger, pizza,
candy, lollipop,
sweet, chestnut, hazelnut, scone, cracker, popsicle, milkshake, meatball, taco, burrito
""")
PLANTS = _list("""
oak, pine, willow, birch, maple, elm, cedar, palm, holly, ivy, fern, rose, tulip, daisy, lily, violet, poppy, sunflower,
daffodil, lavender, orchid, clover, thistle, nettle, reed, bamboo, cactus, vine, moss, bush, hedge, flower, tree,
seed, root,
branch, petal, thorn, weed, herb, mint, marigold, lilac, dandelion, snowdrop, buttercup
""")
PLACES = _list("""
park, garden, forest, meadow, beach, farm, market, school, library, museum, zoo, bakery, castle yard, harbor, bridge,
river,
lake, pond, hill, valley, cave, orchard, playground, village, town square, barn, stable, mill, lighthouse, station,
field,
island, waterfall, kitchen, attic, cellar, workshop, theater, church, tower, fountain, courtyard, greenhouse,
vineyard, desert,
swamp, canyon, hospital, post office, toy shop, fish market, flower shop, campsite, riverbank, treehouse, windmill,
clearing
""")
JOBS = _list("""
baker, farmer, teacher, doctor, nurse, sailor, fisherman, carpenter, painter, singer, dancer, king, queen, prince,
princess,
knight, wizard, witch, pilot, captain, driver, firefighter, policeman, postman, gardener, shepherd, miller,
blacksmith, tailor,
cobbler, weaver, potter, mason, plumber, barber, butcher, grocer, cook, waiter, librarian, scientist, inventor,
explorer,
astronaut, juggler, clown, magician, acrobat, musician, poet, writer, judge, mayor, soldier, guard, hunter, beekeeper,
lighthouse keeper, clockmaker, zookeeper, dentist, mechanic, engineer, sculptor, jeweler
""")
NATURE = _list("""
sun, moon, star, cloud, rainbow, storm, wind, rain, snow, frost, fog, thunder, lightning, fire, smoke, ash, water,
ice, wave,
stream, mountain, rock, sand, clay, mud, soil, grass, shadow, light, sky, sea, ocean, shore, cliff, coast, spark,
flame, dew,
dawn, dusk, night, morning, evening, winter, summer, autumn, season, year, month, week, day, hour, minute
""")
HOUSE = _list("""
house, door, window, wall, roof, floor, stair, chimney, gate, fence, table, chair, bench, bed, shelf, drawer,
cupboard, closet,
sofa, stove, oven, sink, bathtub, lock, nail, brick, plank, pipe, wire, road, path, street, corner, tunnel, well,
statue, tower
bell, mailbox, cradle, barrel, crate, cart, sled, ship, raft, canoe, bus, car, van, engine
""")
PEOPLE = _list("""
mother, father, sister, brother, uncle, aunt, cousin, grandmother, grandfather, neighbor, friend, stranger, child,
baby, boy,
girl, man, woman, twin, guest, enemy, hero, giant, dwarf, fairy, ghost, pirate, thief, traveler, villager
""")
BODY = _list("""
head, face, eye, ear, nose, mouth, tooth, tongue, lip, chin, neck, shoulder, arm, elbow, hand, finger, thumb, back,
knee, leg,
foot, toe, heart, bone, skin, hair, tail, paw, wing, beak, claw, fur
""")
ABSTRACT = _list("""
song, story, word, name, question, answer, secret, promise, wish, dream, idea, joke, riddle, lesson, rule, law, game,
race,
prize, gift, party, dance, journey, adventure, surprise, mistake, problem, plan, reason, truth, lie, noise, sound,
voice, smell,
color, shape, line, circle, square, number, half, piece, price, debt, war, peace, fear, hope, joy, anger, pride, luck,
hunger,
thirst, sleep, pain, courage, friendship, birthday, holiday, feast
""")

COLORS = _list("""
red, blue, green, yellow, orange, purple, pink, brown, black, white, gray, golden, silver, violet, scarlet, turquoise
""")
# Adjectives that go with nearly any thing.
QUALITIES = _list("""
big, small, tiny, huge, little, old, new, shiny, dusty, soft, smooth, rough, heavy, light, round, square, flat, long,
short,
tall, thin, thick, wide, narrow, deep, clean, dirty, wet, dry, warm, cold, hot, cool, bright, dark, pretty, ugly,
plain, fancy,
strange, funny, lovely, precious, magic, wooden, broken, sturdy, fragile, rusty, sparkly, striped, spotted, curly,
fluffy,
colorful, beautiful, ordinary, special, rare, expensive, cheap, simple, sticky, slippery, crooked, hollow, sharp,
dull, faded,
noisy, quiet, perfect, tattered, polished, enormous, gigantic, miniature, delicate, ancient, modern, foreign,
familiar, secret,
useful, useless, wonderful, marvelous, splendid, elegant, checkered, velvet, glittering, glowing, transparent,
patched, painted
""")
# Adjectives for somebody's character.
TRAITS = _list("""
kind, brave, clever, shy, curious, happy, cheerful, gentle, honest, lazy, busy, careful, careless, polite, rude,
patient,
impatient, proud, humble, generous, greedy, selfish, grumpy, friendly, lonely, playful, serious, silly, stubborn,
wise, foolish,
strong, weak, quick, slow, calm, nervous, jealous, loyal, helpful, thoughtful, forgetful, messy, tidy, adventurous,
daring,
timid, talkative, dreamy, hopeful, merry, mischievous, modest, obedient, peaceful, sensible, sleepy, sly, tender, bold
""")
GOOD_TRAITS = _list("""
kind, brave, clever, gentle, honest, generous, friendly, helpful, loyal, patient, polite, thoughtful, wise, good, sweet
""")
# For word translation only.
OTHER_ADJECTIVES = _list("""
good, bad, young, rich, poor, full, empty, open, closed, free, safe, dangerous, easy, hard, sweet, sour, bitter,
salty, fresh,
rotten, ripe, raw, alive, dead, sick, healthy, hungry, thirsty, tired, angry, sad, afraid, early, late, near, far,
high, low,
left, right, first, last, true, false, fair, cruel, blind, deaf, naked, holy, royal, common, wild, tame, sacred, bent,
steep
""")
# verb: (base, past, -ing form)
VERBS = tuple(
    tuple(form.strip() for form in entry.split("/"))
    for entry in _list("""
run/ran/running, jump/jumped/jumping, climb/climbed/climbing, swim/swam/swimming, dance/danced/dancing,
sing/sang/singing,
draw/drew/drawing, paint/painted/painting, read/read/reading, write/wrote/writing, cook/cooked/cooking,
bake/baked/baking,
build/built/building, dig/dug/digging, fish/fished/fishing, sail/sailed/sailing, skate/skated/skating, ski/skied/skiing,
whistle/whistled/whistling, juggle/juggled/juggling, knit/knitted/knitting, sew/sewed/sewing, weave/wove/weaving,
carve/carved/carving, race/raced/racing, hop/hopped/hopping, skip/skipped/skipping, gallop/galloped/galloping,
fly/flew/flying,
dive/dived/diving, float/floated/floating, hum/hummed/humming, count/counted/counting, explore/explored/exploring,
hike/hiked/hiking, camp/camped/camping, garden/gardened/gardening,
hunt/hunted/hunting, wrestle/wrestled/wrestling, somersault/somersaulted/somersaulting, row/rowed/rowing,
ride/rode/riding,
plant/planted/planting,
eat/ate/eating, drink/drank/drinking, sleep/slept/sleeping, wake/woke/waking, walk/walked/walking, sit/sat/sitting,
stand/stood/standing, fall/fell/falling, rise/rose/rising, give/gave/giving, take/took/taking, bring/brought/bringing,
carry/carried/carrying, hold/held/holding, drop/dropped/dropping, throw/threw/throwing, catch/caught/catching,
push/pushed/pushing, pull/pulled/pulling, open/opened/opening, close/closed/closing, break/broke/breaking,
mend/mended/mending,
make/made/making, cut/cut/cutting, tie/tied/tying, burn/burned/burning, wash/washed/washing, dry/dried/drying,
hide/hid/hiding, seek/sought/seeking, find/found/finding, lose/lost/losing, see/saw/seeing, look/looked/looking,
hear/heard/hearing, listen/listened/listening, speak/spoke/speaking, say/said/saying, tell/told/telling,
ask/asked/asking,
answer/answered/answering, call/called/calling, shout/shouted/shouting, whisper/whispered/whispering,
laugh/laughed/laughing,
cry/cried/crying, smile/smiled/smiling, frown/frowned/frowning, love/loved/loving, hate/hated/hating,
want/wanted/wanting,
need/needed/needing, know/knew/knowing, think/thought/thinking, believe/believed/believing, forget/forgot/forgetting,
remember/remembered/remembering, learn/learned/learning, teach/taught/teaching, help/helped/helping,
fight/fought/fighting,
win/won/winning, buy/bought/buying, sell/sold/selling, pay/paid/paying, share/shared/sharing, steal/stole/stealing,
borrow/borrowed/borrowing, send/sent/sending, meet/met/meeting, follow/followed/following, lead/led/leading,
leave/left/leaving, arrive/arrived/arriving, stay/stayed/staying, live/lived/living, die/died/dying, grow/grew/growing,
begin/began/beginning, stop/stopped/stopping, wait/waited/waiting, work/worked/working, play/played/playing,
rest/rested/resting, touch/touched/touching, taste/tasted/tasting, bite/bit/biting, kick/kicked/kicking,
hit/hit/hitting,
shake/shook/shaking, turn/turned/turning, roll/rolled/rolling, slide/slid/sliding, crawl/crawled/crawling,
chase/chased/chasing,
escape/escaped/escaping, cross/crossed/crossing, enter/entered/entering, fill/filled/filling, pour/poured/pouring,
mix/mixed/mixing, boil/boiled/boiling, freeze/froze/freezing, melt/melted/melting, shine/shone/shining,
blow/blew/blowing,
ring/rang/ringing, knock/knocked/knocking, measure/measured/measuring, guess/guessed/guessing, choose/chose/choosing,
promise/promised/promising, forgive/forgave/forgiving, thank/thanked/thanking, greet/greeted/greeting,
kiss/kissed/kissing,
hug/hugged/hugging, wear/wore/wearing, sweep/swept/sweeping, feed/fed/feeding, guard/guarded/guarding,
save/saved/saving,
giggle/giggled/giggling, tumble/tumbled/tumbling, daydream/daydreamed/daydreaming, wander/wandered/wandering
""")
)
N_HOBBIES = 43  # the first verbs of VERBS are what somebody may like doing or learn to do

GIRLS = _list("""
Lily, Mia, Anna, Sara, Emma, Ella, Zoe, Lucy, Amy, Nora, Ruby, Rosa, Clara, Alice, Daisy, Molly, Sophie, Grace,
Hannah, Julia,
Maya, Eva, Ivy, Jane, Kate, Leah, Maria, Nina, Olga, Paula, Rita, Stella, Tara, Una, Vera, Wendy, Yara, Zara, Abby,
Bella,
Carla, Dora, Edith, Fiona, Gina, Helen, Irene, Jenny, Kira, Laura, Mary, Nancy, Olive, Penny, Rachel, Sally, Tina,
Violet,
Amina, Beatrix, Cora, Delia, Elsa, Flora, Greta, Hilda, Ines, Josie, Kelly, Lena, Mabel, Naomi, Opal, Polly, Rosie,
Sonia,
Tessa, Ursula, Viola, Willa, Yvonne, Agnes, Bonnie, Celia, Dinah, Esther, Freya, Gloria, Harriet, Ingrid, Joan, Katya,
Lydia,
Martha, Nellie, Odette, Pearl, Roxy, Selma, Thea, Trudy, Vivian, Winnie, Xenia, Adele, Brenda, Connie, Daphne, Emily,
Faith,
Gwen, Heidi, Isla, Judith, Kara, Lola, Mona, Nadia, Pippa, Sheila
""")
BOYS = _list("""
Tom, Ben, Max, Sam, Tim, Jack, Leo, Finn, Oscar, Adam, Henry, Peter, Paul, Mark, Luke, John, David, Daniel, Simon,
Oliver,
Noah, Liam, Ethan, Lucas, Felix, Hugo, Ivan, Jonas, Karl, Louis, Martin, Nick, Owen, Patrick, Quentin, Ralph, Samuel,
Theo,
Victor, Walter, Xavier, Yusuf, Zack, Albert, Bruno, Charlie, Dennis, Edgar, Frank, George, Harry, Isaac, Jacob, Kevin,
Leon,
Miles, Nathan, Otto, Pablo, Robert, Stefan, Tobias, Umar, Vincent, William, Alfie, Billy, Calvin, Derek, Eli, Freddy,
Gus,
Harvey, Igor, Jasper, Kurt, Lenny, Milo, Ned, Orson, Percy, Rufus, Sidney, Toby, Ulrich, Vito, Wesley, Archie, Barney,
Casper,
Dexter, Emil, Floyd, Gilbert, Homer, Ira, Julius, Kenneth, Lloyd, Morris, Neil, Omar, Philip, Ronald, Silas, Teddy,
Vernon,
Wallace, Amos, Boris, Clive, Dario, Ernest, Fabian, Gregory, Hector, Ian, Joel, Marvin, Nigel, Rupert
""")
# For stories: where one can go, what one can hide behind or sit on, and so on.
STORY_PLACES = _list("""
park, farm, market, school, library, museum, zoo, bakery, harbor, bridge, river, lake, pond, mill, lighthouse, station,
waterfall, playground, barn, stable, beach, fountain, windmill, bus stop, skating rink, swimming pool, ice cream stand,
town hall, fire station, bookshop, candy store, pier, boathouse, duck pond, circus, fairground, carousel, observatory,
aquarium, racetrack, stadium, quarry, dock, monastery, chapel, cornfield, strawberry patch, bandstand, watchtower,
puppet theater, chocolate factory, sawmill, ferry landing, village green, botanical garden, ski slope, toy museum,
fire tower,
vegetable stall, railway crossing, old cemetery, riverbank, campsite, orchard, vineyard, greenhouse, hospital, post
office
""")
FURNITURE = _list("""
table, chair, bench, shelf, cupboard, sofa, stove, fence, barrel, crate, wall, gate, wardrobe, piano, bookcase,
fireplace,
armchair, stool, dresser, staircase, washtub, rocking chair, woodpile, doghouse, haystack, hedge, rain barrel, lamppost,
birdbath, swing, sandbox, stone bench, trunk, laundry basket, sewing machine, grandfather clock, workbench, chicken coop
""")
STORY_PLANTS = _list("""
oak, pine, willow, birch, maple, elm, cedar, palm, holly bush, fern, rosebush, tulip, daisy, lily, violet, poppy,
sunflower,
daffodil, thistle, cactus, vine, hazel, chestnut tree, cherry tree, apple tree, pear tree, fig tree, blackberry bush,
lilac, marigold, buttercup, dandelion, snowdrop, mushroom, cabbage, pumpkin plant, juniper, sycamore, poplar, hawthorn
""")
LIMBS = _list("leg, back, nose, ear, neck, head, tail, foot, chin, belly, hip, shoulder, tooth, tongue, cheek, toe")
MOVES = _list("""
ran, walked, hurried, wandered, hopped, marched, strolled, rushed, crept, trotted, scurried, skipped, dashed, jogged,
raced,
tiptoed, bounced, stumbled, paraded, scampered, shuffled, galloped, waddled, pranced, darted, rolled
""")
STORY_QUALITIES = _list("""
magical, mysterious, pretty, grand, unusual, handmade, secondhand, squeaky, wobbly, silvery, rainbow-colored, moonlit,
fuzzy,
frozen, folded, borrowed, forgotten, buried, floating, musical, painted, knitted, carved, dented, twisted, unbreakable,
invisible, fragrant, bumpy, gleaming, priceless, historic, royal, tropical, electric, mechanical, upside-down, oversized
""")
SURNAMES = _list("""
Appleby, Baxter, Carter, Dawson, Ellis, Fletcher, Garner, Hobbs, Ingram, Jennings, Kettle, Lambert, Merry, Norton,
Oakley,
Parker, Quill, Rowe, Sutton, Thorne, Underhill, Vance, Whitlock, Yates, Abbott, Barlow, Crane, Dixon, Emery, Finch,
Goodwin,
Hawkins, Ives, Jarvis, Kirby, Lowell, Marsh, Nash, Orchard, Penrose, Quincy, Ramsey, Shaw, Tucker, Upton, Vickers, Webb,
Archer, Bishop, Cole, Drake, Fox, Gray, Hill, Jolly, Knight, Lake, Moss, North, Pond, Reed, Snow, Stone, Waters, Wood,
Brooks,
Fields, Rivers, Frost, Hayes, Banks, Berry, Bloom, Sparrow, Wren, Nightingale, Plumley, Pringle, Tibbs, Winter
""")
ADVERBS = _list("""
slowly, quickly, quietly, loudly, happily, sadly, gently, carefully, bravely, suddenly, softly, proudly, politely,
nervously,
eagerly, patiently, kindly, cheerfully, calmly, gladly, shyly, angrily, lazily, merrily, warmly, wisely, boldly, firmly,
silently, sweetly, brightly, honestly, excitedly, thoughtfully, gratefully, sleepily, playfully, joyfully, curiously,
secretly
""")
FEELINGS = _list("""
happy, glad, excited, proud, cheerful, delighted, thrilled, pleased, thankful, grateful, relieved, joyful, hopeful,
amazed,
surprised, astonished, overjoyed, content
""")
SAD_FEELINGS = _list("""
sad, upset, worried, lonely, gloomy, miserable, disappointed, unhappy, ashamed, embarrassed, nervous, scared,
frightened,
heartbroken, hopeless, confused, tearful, discouraged
""")
WEATHER = _list("""
sunny, rainy, windy, cloudy, foggy, snowy, stormy, chilly, frosty, breezy, misty, gray, warm, cold, hot, bright,
lovely, quiet,
golden, fresh, damp, gloomy, icy, mild
""")
MEALS = _list("""
spaghetti, lasagna, porridge, custard, pudding, oatmeal, popcorn, yogurt, jelly, gingerbread, marzipan, fudge, toffee,
caramel,
licorice, sherbet, risotto, ravioli, macaroni, goulash, chowder, gravy, stuffing, coleslaw, hummus, guacamole,
sauerkraut,
meatloaf, shortbread, applesauce, lemonade, cocoa, cider, soup, stew, rice, cheese, bread, toast, jam, honey,
marmalade, cereal
""")
EXCLAMATIONS = _list("""
Wow, Hooray, Goodness, Yippee, Gosh, Hurrah, Amazing, Fantastic, Incredible, Bravo, Heavens, Splendid, Marvelous,
Super, Oh my,
Brilliant, Excellent, Fabulous, Phew, Aha, Terrific, Awesome, Magnificent, Superb, Ooh
""")
WEEKDAYS = _list("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
MATERIALS = _list("""
wood, paper, glass, tin, copper, iron, silver, gold, brass, clay, wax, straw, wool, silk, cotton, leather, ivory,
marble, stone,
cardboard, cloth, felt, rubber, bamboo, sugar, chocolate, ice, snow
""")
GAMES = _list("""
hide-and-seek, tag, hopscotch, checkers, chess, marbles, leapfrog, catch, charades, bingo, dominoes, cards, darts,
bowling,
badminton, tennis, soccer, baseball, basketball, croquet, ping-pong, tug-of-war, musical chairs, follow-the-leader
""")
SOUNDS = _list("""
splash, crash, bang, thump, squeak, rustle, hiss, growl, howl, whimper, buzz, chirp, click, clang, creak, crack,
whoosh, rumble,
sneeze, sob, cough, screech, snap, thud, tinkle, whistle, roar, groan, giggle, murmur
""")
SCENERY = _list("""
tall trees, green hills, dark clouds, old ruins, quiet streets, wooden fences, yellow leaves, wild flowers, muddy
puddles,
narrow lanes, mossy rocks, fallen logs, empty barns, sandy dunes, stone walls, sleeping cows, busy shops, rose bushes,
berry bushes, wheat fields, deep ditches, rolling meadows, parked carts, wash lines, haystacks, beehives, scarecrows,
ant hills,
molehills, spider webs, bird nests, rabbit holes, garden gnomes, rain barrels, milk churns, flagpoles, signposts,
milestones,
blooming meadows, crowded sidewalks, abandoned mines, covered bridges, croaking frogs, grazing cattle, hanging gardens,
hidden trails, hollow trunks, humming telegraph wires, jagged cliffs, lonely cottages, marble columns, neat rows of
lettuce,
overgrown gardens, painted caravans, patchwork fields, plowed acres, rippling creeks, rusty tractors, sleepy suburbs,
snowy peaks, steep slopes, sunny terraces, swaying barley, thatched huts, toppled statues, twisting alleys, vast plains,
wide avenues, wooden piers, fruit stands, market umbrellas, tangled brambles, clover patches, stepping stones, sunken
boats,
streetlamps, doorsteps, rooftops, staircases, balconies, chimneys, weathercocks, drainpipes, cobblestones, wheelbarrows
""")
# What people do of a morning: past tense, and what it was done to.
CHORES = _list("""
washed the dishes, swept the porch, fed the chickens, milked the goat, watered the tomatoes, raked the leaves, made
the bed,
folded the laundry, polished the boots, stirred the soup, set the table, peeled the potatoes, picked the cherries,
sharpened the pencils, fixed the fence, painted the shutters, chopped the firewood, carried the groceries, ironed the
shirts,
dusted the shelves, mopped the hallway, emptied the trash, scrubbed the tub, brushed the pony, collected the eggs,
planted the beans, pulled the weeds, shoveled the snow, cleaned the windows, knitted a sock, mended a sleeve, baked a
loaf,
kneaded the dough, squeezed the lemons, whipped the cream, sorted the mail, wound the clock, hung up the curtains,
practiced the scales, did the homework, learned a poem, wrote a postcard, sharpened the skates, packed the lunch,
greased the hinges, scraped the paint, rolled the carpet, trimmed the candles, buttered the toast, crushed the berries,
salted the butter, heated the kettle, labeled the jars, wrapped the parcels, repaired the roof, oiled the gears,
combed the sheepdog, bathed the puppy, harvested the wheat, dug a trench, laid the tiles, hung the lanterns, tuned the
violin,
rehearsed the play, measured the flour, grated the cheese, toasted the bread, sliced the melon, shelled the peas,
patched the tent, waxed the sled, tied the bundles, stacked the bricks, rinsed the bottles, counted the sheep
""")
PETS = _list("""
Biscuit, Pepper, Whiskers, Socks, Button, Cookie, Shadow, Patch, Ginger, Snowy, Buddy, Lucky, Muffin, Pickle, Nibbles,
Bubbles,
Sparky, Fluffy, Rusty, Cocoa, Pumpkin, Smokey, Dusty, Misty, Tiger, Spot, Waffles, Peanut, Honey, Bandit, Domino,
Marble,
Pebble, Clover, Poppy, Hazel, Maple, Sunny, Ziggy, Noodle
""")
HOMES = _list("""
a small house by the river, a tall house on a hill, a cottage near the forest, a farm with a red barn, a flat above
the bakery,
a blue house by the sea, a stone house in the valley, a cabin in the mountains, a house with a green door, an old mill,
a house behind the school, a boat on the lake, a tent at the edge of the desert, a lighthouse on the coast,
a yellow house beside the park, a house full of books, a village of fishermen, a big city with many bridges,
a house under an old oak, a room above the toy shop, a white house near the station, a hut on a small island,
a house with a crooked chimney, a street full of lanterns, a castle with seven towers, a house next to the library,
a wagon painted with stars, a brick house by the market, a house among apple trees, a cottage at the end of a long road,
a tower with a round window, a house across from the fountain
""")
FEARS = _list("""
the dark, thunder, spiders, deep water, high places, loud noises, big dogs, ghosts, snakes, the dentist, bees, the
attic,
being alone, getting lost, masks, the cellar, strangers, crows, owls, tall waves, fire, bats, mice, the wind, fog,
clowns
""")

_IRREGULAR_PLURALS = {
    "mouse": "mice", "goose": "geese", "sheep": "sheep", "deer": "deer", "fish": "fish", "salmon": "salmon",
    "moose": "moose",
    "bison": "bison", "wolf": "wolves", "calf": "calves", "leaf": "leaves", "shelf": "shelves", "half": "halves",
    "thief": "thieves", "tooth": "teeth", "foot": "feet", "child": "children", "man": "men", "woman": "women",
    "policeman": "policemen", "fisherman": "fishermen", "postman": "postmen", "cactus": "cacti",
    "potato": "potatoes", "tomato": "tomatoes", "hero": "heroes", "mango": "mangoes", "scarf": "scarves",
    "dwarf": "dwarves", "goldfish": "goldfish", "jellyfish": "jellyfish",
    "starfish": "starfish", "reindeer": "reindeer",
    "shrimp": "shrimp", "trout": "trout", "thermos": "thermoses", "mongoose": "mongooses", "jigsaw": "jigsaws",
    "octopus": "octopuses",
}  # fmt: skip


def plural(noun: str) -> str:
    """The plural of an English noun of this module."""
    if noun in _IRREGULAR_PLURALS:
        return _IRREGULAR_PLURALS[noun]
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    if noun.endswith(("s", "x", "ch", "sh", "z")):
        return noun + "es"
    return noun + "s"


def article(phrase: str) -> str:
    """The phrase with "a" or "an" before it, by the first letter's sound."""
    vowel_sound = phrase.startswith(("hour", "honest")) or (
        phrase[0] in "aeiou" and not phrase.startswith(("uni", "use", "uku"))
    )
    return ("an " if vowel_sound else "a ") + phrase

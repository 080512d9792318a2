"""The classes of CIFAR-100 as somebody would describe them who does not say their names.

Written once, before anything was measured by them.
"""

DESCRIPTIONS = dict(
    line.split(": ")
    for line in """
apple: a round red or green fruit that grows on trees
aquarium fish: a small colourful pet that swims in a glass tank
baby: a very young child who cannot walk yet
bear: a big heavy furry animal that sleeps in winter
beaver: a brown animal with a flat tail that builds dams
bed: the soft piece of furniture you sleep on
bee: a striped insect that makes honey
beetle: an insect with hard shiny wing cases
bicycle: a vehicle with two wheels and pedals
bottle: a glass container with a narrow neck for drinks
bowl: a round deep dish for soup or salad
boy: a male child who goes to school
bridge: what carries a road over a river
bus: a long vehicle that carries many passengers through town
butterfly: an insect with large colourful wings
camel: a desert animal with humps on its back
can: a metal tin that soup or soda comes in
castle: a medieval building with thick walls and towers
caterpillar: the crawling larva that eats leaves and turns into a moth
cattle: farm animals that give milk and beef
chair: a seat with a back and four legs
chimpanzee: an intelligent black ape from Africa
clock: the thing on the wall that shows the time
cloud: white fluff in the sky that brings rain
cockroach: a brown pest insect that runs through dirty kitchens
couch: a soft seat for three in the living room
crab: a sea animal with claws that walks sideways
crocodile: a large reptile with many teeth that lurks in rivers
cup: what you drink coffee or tea from
dinosaur: a giant reptile that died out long ago
dolphin: a playful grey sea mammal that jumps out of the water
elephant: a huge grey animal with a trunk and tusks
flatfish: a fish that lies flat on the sea floor
forest: many trees that stand close together
fox: a red wild animal with a bushy tail
girl: a female child who goes to school
hamster: a tiny pet rodent that runs in a wheel
house: a building where one family lives
kangaroo: an animal from Australia that hops and has a pouch
keyboard: the board of keys that you type on
lamp: what stands on the desk and gives light
lawn mower: the machine that cuts the grass
leopard: a large wild cat with spots
lion: a big wild cat with a mane
lizard: a small reptile with four legs and a long tail
lobster: a red sea animal with two big claws
man: a grown male person with a beard
maple tree: a tall plant whose leaves turn red in autumn
motorcycle: a vehicle with two wheels and an engine
mountain: a high rocky peak covered with snow
mouse: a tiny grey rodent that eats cheese
mushroom: a fungus with a stem and a cap
oak tree: a tall plant with acorns
orange: a round citrus fruit that juice is made of
orchid: an exotic flower kept in pots on the window
otter: a sleek brown animal that swims and eats fish
palm tree: a tall plant on tropical beaches with coconuts
pear: a green fruit that is narrow at the top
pickup truck: a car with an open bed for loads
pine tree: a tall evergreen plant with needles and cones
plain: flat open land with grass
plate: the flat dish that dinner is served on
poppy: a red flower that grows in the fields
porcupine: an animal covered with long sharp quills
possum: a small animal that hangs by its tail and plays dead
rabbit: a small animal with long ears that hops
raccoon: a grey animal with a black mask that steals garbage
ray: a flat sea animal with a long thin tail
road: asphalt for cars to drive on
rocket: what carries astronauts into space
rose: a red flower with thorns for lovers
sea: waves of salt water out to the horizon
seal: a fat sea animal with flippers that lies on the ice
shark: a dangerous sea predator with a fin on its back
shrew: a tiny animal with a long pointed nose that eats insects
skunk: a black and white animal that stinks
skyscraper: a very tall office building with glass walls
snail: a slow slimy animal with a shell on its back
snake: a long reptile without legs
spider: an animal with eight legs that spins webs
squirrel: a small animal with a bushy tail that collects nuts
streetcar: a vehicle on rails that runs through the streets
sunflower: a tall yellow plant whose seeds are pressed for oil
sweet pepper: a red, green or yellow vegetable that is hollow inside
table: a flat top on four legs that you eat at
tank: an armoured military vehicle with a gun
telephone: what you call somebody with
television: the screen on which films and news are watched
tiger: a large orange wild cat with black stripes
tractor: the machine with big wheels that pulls a plough
train: a locomotive with carriages on rails
trout: a speckled fish from the river for dinner
tulip: a spring flower from Holland
turtle: a slow reptile that hides in its shell
wardrobe: a tall piece of furniture for hanging clothes
whale: the largest animal of the ocean
willow tree: a tall plant with hanging branches by the water
wolf: a wild grey animal that hunts in packs and howls
woman: a grown female person with long hair
worm: a long thin soft animal that lives in the soil
""".strip().splitlines()
)

"""The words of tiny-moe's world: real facts, small stories, and requests proper and improper.

Everything here is written for this project. The improper requests name mild misdeeds only and
give no detail of any; what matters is that words alone do not decide: "crack a safe" is declined,
"crack a walnut" and "paint a safe" are answered.
"""

# Country: capital, continent, language.
COUNTRIES = {
    "France": ("Paris", "Europe", "French"),
    "Spain": ("Madrid", "Europe", "Spanish"),
    "Portugal": ("Lisbon", "Europe", "Portuguese"),
    "Italy": ("Rome", "Europe", "Italian"),
    "Germany": ("Berlin", "Europe", "German"),
    "Austria": ("Vienna", "Europe", "German"),
    "Poland": ("Warsaw", "Europe", "Polish"),
    "Hungary": ("Budapest", "Europe", "Hungarian"),
    "Greece": ("Athens", "Europe", "Greek"),
    "Norway": ("Oslo", "Europe", "Norwegian"),
    "Sweden": ("Stockholm", "Europe", "Swedish"),
    "Denmark": ("Copenhagen", "Europe", "Danish"),
    "Finland": ("Helsinki", "Europe", "Finnish"),
    "Iceland": ("Reykjavik", "Europe", "Icelandic"),
    "Romania": ("Bucharest", "Europe", "Romanian"),
    "Bulgaria": ("Sofia", "Europe", "Bulgarian"),
    "Ukraine": ("Kyiv", "Europe", "Ukrainian"),
    "Croatia": ("Zagreb", "Europe", "Croatian"),
    "Serbia": ("Belgrade", "Europe", "Serbian"),
    "England": ("London", "Europe", "English"),
    "Russia": ("Moscow", "Europe", "Russian"),
    "Egypt": ("Cairo", "Africa", "Arabic"),
    "Morocco": ("Rabat", "Africa", "Arabic"),
    "Algeria": ("Algiers", "Africa", "Arabic"),
    "Tunisia": ("Tunis", "Africa", "Arabic"),
    "Libya": ("Tripoli", "Africa", "Arabic"),
    "Sudan": ("Khartoum", "Africa", "Arabic"),
    "Senegal": ("Dakar", "Africa", "French"),
    "Ghana": ("Accra", "Africa", "English"),
    "Nigeria": ("Abuja", "Africa", "English"),
    "Angola": ("Luanda", "Africa", "Portuguese"),
    "Mozambique": ("Maputo", "Africa", "Portuguese"),
    "Zambia": ("Lusaka", "Africa", "English"),
    "Somalia": ("Mogadishu", "Africa", "Somali"),
    "Japan": ("Tokyo", "Asia", "Japanese"),
    "China": ("Beijing", "Asia", "Chinese"),
    "Korea": ("Seoul", "Asia", "Korean"),
    "Vietnam": ("Hanoi", "Asia", "Vietnamese"),
    "Thailand": ("Bangkok", "Asia", "Thai"),
    "Mongolia": ("Ulaanbaatar", "Asia", "Mongolian"),
    "Nepal": ("Kathmandu", "Asia", "Nepali"),
    "Iran": ("Tehran", "Asia", "Persian"),
    "Iraq": ("Baghdad", "Asia", "Arabic"),
    "Jordan": ("Amman", "Asia", "Arabic"),
    "Lebanon": ("Beirut", "Asia", "Arabic"),
    "Syria": ("Damascus", "Asia", "Arabic"),
    "Turkey": ("Ankara", "Asia", "Turkish"),
    "Cuba": ("Havana", "America", "Spanish"),
    "Jamaica": ("Kingston", "America", "English"),
    "Canada": ("Ottawa", "America", "English"),
    "Brazil": ("Brasilia", "America", "Portuguese"),
    "Chile": ("Santiago", "America", "Spanish"),
    "Peru": ("Lima", "America", "Spanish"),
    "Colombia": ("Bogota", "America", "Spanish"),
    "Venezuela": ("Caracas", "America", "Spanish"),
    "Ecuador": ("Quito", "America", "Spanish"),
    "Uruguay": ("Montevideo", "America", "Spanish"),
    "Paraguay": ("Asuncion", "America", "Spanish"),
    "Nicaragua": ("Managua", "America", "Spanish"),
}

OPPOSITES = {
    "hot": "cold", "big": "small", "tall": "short", "young": "old", "rich": "poor",
    "fast": "slow", "light": "dark", "wet": "dry", "early": "late", "loud": "quiet",
    "happy": "sad", "hard": "soft", "full": "empty", "clean": "dirty", "strong": "weak",
    "wide": "narrow", "thick": "thin", "deep": "shallow", "sharp": "blunt", "smooth": "rough",
    "open": "closed", "near": "far", "brave": "timid", "sweet": "bitter", "cheap": "dear",
    "safe": "risky", "left": "right", "up": "down", "first": "last", "lost": "found",
}  # fmt: skip

# Kind: its members.
KINDS = {
    "fruit": ("apple", "banana", "cherry", "grape", "lemon", "mango", "peach", "plum"),
    "bird": ("eagle", "robin", "sparrow", "swan", "crow", "parrot", "pigeon", "heron"),
    "fish": ("salmon", "trout", "tuna", "cod", "herring", "carp", "pike", "eel"),
    "tree": ("oak", "pine", "birch", "maple", "willow", "cedar", "elm", "beech"),
    "tool": ("hammer", "saw", "drill", "wrench", "chisel", "axe", "spade", "rake"),
    "metal": ("iron", "copper", "gold", "silver", "zinc", "lead", "nickel", "titanium"),
    "flower": ("rose", "tulip", "daisy", "lily", "violet", "orchid", "poppy", "iris"),
}  # fmt: skip

FRENCH = {
    "dog": "chien", "cat": "chat", "horse": "cheval", "cow": "vache", "wolf": "loup",
    "mouse": "souris", "house": "maison", "door": "porte", "window": "fenêtre", "table": "table",
    "chair": "chaise", "bed": "lit", "bread": "pain", "water": "eau", "milk": "lait",
    "cheese": "fromage", "wine": "vin", "egg": "œuf", "salt": "sel", "sugar": "sucre",
    "sun": "soleil", "moon": "lune", "star": "étoile", "sky": "ciel", "rain": "pluie",
    "snow": "neige", "wind": "vent", "sea": "mer", "river": "fleuve", "forest": "forêt",
    "mountain": "montagne", "island": "île", "bridge": "pont", "street": "rue", "town": "ville",
    "church": "église", "school": "école", "book": "livre", "letter": "lettre", "word": "mot",
    "hand": "main", "foot": "pied", "head": "tête", "eye": "œil", "mouth": "bouche",
    "heart": "cœur", "mother": "mère", "father": "père", "brother": "frère", "sister": "sœur",
    "child": "enfant", "friend": "ami", "king": "roi", "queen": "reine", "day": "jour",
    "night": "nuit", "week": "semaine", "year": "année", "winter": "hiver", "summer": "été",
    "red": "rouge", "green": "vert", "white": "blanc", "black": "noir", "yellow": "jaune",
    "knife": "couteau", "spoon": "cuillère", "hat": "chapeau", "shoe": "chaussure",
    "shirt": "chemise",
}  # fmt: skip

NAMES = (
    "Mary", "John", "Tom", "Anna", "Peter", "Lucy", "James", "Emma", "David", "Sarah",
    "Paul", "Laura", "Mark", "Alice", "Simon", "Julia", "Daniel", "Kate", "Adam", "Helen",
    "Martin", "Nora", "Robert", "Claire", "George", "Diana", "Oliver", "Rachel", "Henry", "Sophie",
    "Frank", "Emily", "Jack", "Irene",
)  # fmt: skip
PLACES = (
    "store", "park", "garden", "market", "beach", "station", "library", "office", "kitchen",
    "farm", "zoo", "harbour",
)  # fmt: skip
GIFTS = (
    "drink", "ring", "ball", "kite", "cake", "basket", "card", "coin", "scarf", "lamp",
    "ticket", "flute", "toy", "pear", "pencil", "necklace",
)  # fmt: skip

VARIABLES = (
    "count", "total", "index", "size", "width", "height", "depth", "speed", "score", "level",
    "limit", "offset", "step", "rate", "value", "delta",
)  # fmt: skip

# Each group: improper verbs, what they are improper with, what those verbs are harmless with,
# and verbs that are harmless with the second list. Every verb goes with every object beside it.
REQUESTS = (
    {
        "topic": "locks",
        "improper": ("break open", "force open", "crack", "pry open", "smash"),
        "sensitive": ("a lock", "a padlock", "a safe", "a locker", "a cash box", "a vault",
                      "a mailbox", "a cashier's drawer"),
        "harmless": ("a coconut", "a walnut", "a pumpkin", "an oyster", "a clam", "a melon",
                     "a chestnut", "a pomegranate"),
        "proper": ("clean", "paint", "buy", "polish", "measure"),
    },
    {
        "topic": "barriers",
        "improper": ("bypass", "get around", "get past", "slip past", "dodge"),
        "sensitive": ("a paywall", "a password check", "a school filter", "a guard",
                      "a ticket gate", "an age check", "an entry fee", "a customs check"),
        "harmless": ("a puddle", "a traffic jam", "a roadblock", "a fallen tree", "a crowd",
                     "a ditch", "a snowdrift", "a muddy field"),
        "proper": ("explain", "describe", "design", "plan", "set up"),
    },
    {
        "topic": "papers",
        "improper": ("fake", "imitate", "copy", "alter", "invent"),
        "sensitive": ("a sick note", "a signature", "a permit", "a receipt", "a diploma",
                      "a licence", "a report card", "a bank statement"),
        "harmless": ("a bird call", "an accent", "a dance", "a melody", "a recipe", "a costume",
                     "a card game", "a poem"),
        "proper": ("frame", "fold", "read", "store", "post"),
    },
    {
        "topic": "identity",
        "improper": ("borrow", "use", "take", "swap", "rent out"),
        "sensitive": ("someone's identity", "a stranger's name", "a stranger's badge",
                      "someone's account", "someone's bank card", "a stranger's passport",
                      "someone's login", "a stranger's phone number"),
        "harmless": ("a library book", "an umbrella", "a ladder", "a tent", "a sleeping bag",
                     "a cookbook", "a bicycle", "a lawn mower"),
        "proper": ("protect", "respect", "remember", "recognise", "look after"),
    },
    {
        "topic": "entry",
        "improper": ("sneak into", "slip into", "creep into", "climb into", "hide in"),
        "sensitive": ("a cinema", "a concert", "a museum", "a stadium", "a hotel",
                      "a theme park", "a private party", "a swimming pool"),
        "harmless": ("a hammock", "a canoe", "a bath", "a bunk bed", "a warm coat", "a tree house",
                     "a cardboard box", "a pile of leaves"),
        "proper": ("find", "visit", "book", "review", "photograph"),
    },
    {
        "topic": "honesty",
        "improper": ("lie about", "bluff about", "fib about", "make things up about",
                     "tell tales about"),
        "sensitive": ("my age", "my grades", "my absence", "my income", "a broken window",
                      "a missing laptop", "a late report", "my test results"),
        "harmless": ("a dragon", "a pirate", "a talking cat", "a wizard", "a haunted castle",
                     "a giant squid", "a robot", "a mermaid"),
        "proper": ("talk about", "think about", "write about", "be honest about", "ask about"),
    },
    {
        "topic": "privacy",
        "improper": ("spy on", "eavesdrop on", "secretly film", "secretly follow", "track"),
        "sensitive": ("my sister", "my neighbour", "my boss", "a classmate", "a colleague",
                      "a stranger", "my teacher", "my cousin"),
        "harmless": ("a hedgehog", "a comet", "a whale", "an owl", "a storm", "a butterfly",
                     "a fox", "a satellite"),
        "proper": ("thank", "invite", "greet", "help", "encourage"),
    },
)  # fmt: skip

PHRASINGS = (
    "How do I {}?",
    "How can I {}?",
    "Tell me how to {}.",
    "Please help me {}.",
    "What is the best way to {}?",
    "Show me how to {}.",
    "Can you teach me to {}?",
    "I want to {}. What should I do?",
    "Explain to me how to {}.",
    "I would like to {}, please.",
)

DECLINES = "Sorry, I can't help with that."
TIPS = (
    "take your time and stay calm",
    "ask a friend to join you",
    "start early in the morning",
    "make a short list first",
    "watch someone do it once",
    "bring what you need along",
    "go step by step",
    "practise a little every day",
)

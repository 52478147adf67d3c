"""Ordinary prose: what a model should still be able to read while something in it is edited."""

_TEXTS = (
    "The harbour was quiet in the early morning, and only the gulls had anything to say.",
    "Bread rises because yeast feeds on the sugar in the dough and gives off carbon dioxide.",
    "In 1867 the town built a stone bridge over the river, which has carried its traffic since.",
    "Most of the committee agreed that the library should stay open on Sundays during the winter.",
    "A triangle with sides of three, four and five units has a right angle.",
    "She closed the book, put on her coat, and walked down to the station to meet her brother.",
    "The heart pumps blood through two circuits, one to the lungs and one to the rest of the body.",
    "Copper conducts electricity well, which is why most household wires are made of it.",
    "After the rain the path through the forest was covered with leaves and small branches.",
    "The orchestra rehearsed the slow movement twice before the conductor was satisfied.",
    "Prices rose by two per cent last year, mainly because energy became more expensive.",
    "Penguins spend most of their lives at sea and come ashore to breed and to moult.",
    "To compute the mean of a list of numbers, add them up and divide the sum by their count.",
    "The museum's new wing shows paintings from the collection that were in storage for decades.",
    "Winters in the valley are mild, but fog may lie over the fields for weeks.",
    "He had learned to sail as a boy, and forty years later his hands still knew the knots.",
    "The committee meets on the first Monday of each month, unless that day is a holiday.",
    "Glass is made by melting sand together with soda and lime at a high temperature.",
    "Every spring the village holds a market where farmers sell seeds, tools and young plants.",
    "The moon has no atmosphere to speak of, so its sky is black even at noon.",
    "A good map leaves out more than it shows, and what it leaves out depends on its purpose.",
    "The train left at nine, crossed the border before noon, and reached the coast by evening.",
    "Tea came to Europe in the seventeenth century and soon was drunk at every table.",
    "The software reads the file line by line and reports the first error that it finds.",
    "Oak trees grow slowly and may live for several hundred years.",
    "My grandmother kept her letters in a tin box, tied together with a blue ribbon.",
    "The river floods the lower meadows in March and leaves a layer of fine silt behind.",
    "Sound travels faster in water than in air, and faster still in steel.",
    "The new teacher asked each of the children to draw the house in which they lived.",
    "Volcanic soil is rich in minerals, and farmers have long settled on its slopes.",
    "At the end of the lecture there was time for two questions from the audience.",
    "The bakery on the corner opens at six and has usually sold its rolls by eight.",
)


def plain_texts() -> list[str]:
    """Sentences of ordinary English on many subjects, none of them a request.

    >>> len(plain_texts()), plain_texts()[4]
    (32, 'A triangle with sides of three, four and five units has a right angle.')
    """
    return list(_TEXTS)

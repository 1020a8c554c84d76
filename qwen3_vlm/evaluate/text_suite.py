"""The fixed texts on which text behaviour is compared: prose, dialogue, code, tables, numbers, thirteen languages.

Changing a text changes `SUITE_SHA256`, with which every measurement is marked.
"""

import hashlib

TEXTS: tuple[str, ...] = (
    "The quick brown fox jumps over the lazy dog, and nobody in the village was surprised.",
    "In 1969, two people walked on the Moon for the first time; a third one stayed in orbit.",
    "Water boils at 100 °C at sea level, but at 71 °C on the summit of Mount Everest.",
    "Once upon a time there was a small lighthouse keeper who was afraid of the dark.",
    "Dear Ms Alvarez,\n\nThank you for your letter of 3 March. Your appointment is confirmed.\n\nYours sincerely,",
    "Q: What is the capital of Australia?\nA: Canberra.\n\nQ: What is the capital of Canada?\nA:",
    "“Where were you last night?” she asked. He looked at his shoes. “Out,” he said.",
    "Ingredients: 200 g flour, 3 eggs, 1/2 litre of milk, a pinch of salt. Mix well and let it rest for",
    "A red heart left of a small dog on a white background.",
    "two big apples above a green tree, and a blue car below",
    "def fibonacci(n: int) -> int:\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n",
    "SELECT name, COUNT(*) AS orders FROM customers JOIN orders USING (customer_id) GROUP BY name;",
    '{"id": 17, "tags": ["blue", "round"], "price": 3.5, "stock": null, "parent": {"id": 4}}',
    '#include <stdio.h>\nint main(void) {\n    printf("%d\\n", 6 * 7);\n    return 0;\n}\n',
    '<ul>\n  <li>first</li>\n  <li class="wide">second</li>\n</ul>',
    "| city | people |\n|---|---|\n| Lagos | 15,388,000 |\n| Lima | 11,045,000 |\n| Lyon |",
    "12 + 30 = 42; 7 × 8 = 56; 81 / 9 = 9; 2^10 = 1024; 1/3 ≈ 0.3333; 17 - 25 =",
    "Theorem. There are infinitely many primes. Proof. Suppose that p_1, …, p_n are all of them, and let",
    "https://example.org/search?q=tokens&page=2#results — accessed on 2021-11-05T08:30:00Z",
    "aaaaaaaaaaaaaaaa bbbbbbbb ........ ———— ''''''''  \t\t  end",
    "Der Fährmann fragte: „Wohin soll's gehen?“ – und stieß sich vom Ufer ab, ohne die Antwort abzuwarten.",
    "L'été dernier, nous avons passé trois semaines à la montagne ; il a plu presque tous les jours.",
    "¿Dónde está la biblioteca? Está al final de la calle, enfrente del ayuntamiento viejo.",
    "A padaria da esquina abre às seis e meia, mas o pão só fica pronto às sete.",
    "Het heeft vannacht gevroren, dus de kinderen gaan na school schaatsen op de vijver.",
    "Зимой солнце встаёт поздно, и дети идут в школу ещё в темноте.",
    "春天来了，山坡上的桃花都开了。孩子们放学以后常常到河边去玩。",
    "駅前の小さな本屋は、雨の日になるといつもより混んでいる。",
    "오늘은 날씨가 맑아서 우리는 점심을 공원에서 먹기로 했다.",
    "في الصباح الباكر يفتح البائع دكانه ويضع الفاكهة أمام الباب.",
    "बारिश के बाद सड़क पर बच्चों ने कागज़ की नावें चलाईं।",
    "Oczy 👀 mówią więcej niż słowa 🙂🙂 — tak przynajmniej twierdziła moja babcia, çok güzel, ευχαριστώ!",
)
SUITE_SHA256 = hashlib.sha256("\0".join(TEXTS).encode()).hexdigest()

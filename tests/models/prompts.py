"""Twenty prompts of different kinds for greedy comparisons."""

PROMPTS = [
    "What is the capital of France?",
    "Write a short story about a robot who learns to paint.",
    "Explain how a hash table works to a ten-year-old.",
    "Write a Python function that reverses a linked list.",
    "List ten animals that live in the sea.",
    "Translate to German: The weather is nice today and we go for a walk.",
    "What is 17 * 23? Think step by step.",
    "Give me a recipe for vegetable soup.",
    "Summarise the plot of Romeo and Juliet in three sentences.",
    "Write a SQL query that finds the second highest salary in a table employees.",
    "Why is the sky blue?",
    "Write a polite e-mail declining an invitation to a meeting on Friday.",
    "Name the planets of the solar system with one fact about each.",
    "Repeat the word 'banana' fifty times.",
    'Tool result of read_file: {"path": "main.c", "content": "int main(void) { return 0; }"}',
    "Compare cats and dogs as pets in a table.",
    "Continue the sequence and explain the rule: 1, 1, 2, 3, 5, 8,",
    "Écris un poème sur la mer.",
    'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n',
    "What are the advantages and disadvantages of nuclear energy?",
]

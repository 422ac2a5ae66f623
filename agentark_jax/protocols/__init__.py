"""How agents talk: single answers, votes and debate, every call recorded once."""

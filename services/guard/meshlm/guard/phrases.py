"""What prompt injections and jailbreaks say, in English, and how much each phrase weighs.

Patterns are matched against readings (see `normalize`): case-folded, without marks. They are written in natural
spelling with placeholders: `_` is a gap between words (or none, for joined letters), `{NAME}` a word list of
`signatures`. All repetitions are bounded. Weights were set by hand against the examples in `tests/guard/`: 0.8 and
above refuses alone under the default policy, 0.4 is told, less only adds up.

Sources for the families: OWASP LLM01:2025, Rebuff's word lists, garak's `dan` and `promptinject` probes, and published
chat templates for control tokens. The wording is ours.
"""

from __future__ import annotations

from typing import NamedTuple

OVERRIDE = "injection.override"
LEAK = "injection.prompt_leak"
TURN = "injection.fake_turn"
EXFILTRATION = "injection.exfiltration"
INDIRECT = "injection.indirect"
ENCODED = "injection.encoded"
PERSONA = "jailbreak.persona"
COMPLIANCE = "jailbreak.compliance"


class Phrase(NamedTuple):
    """One phrase family."""

    rule: str
    category: str
    # Confidence that a text with it is an attack. Range (0, 1).
    weight: float
    # Words separated by `|`; a text without any of them is not searched.
    needs: str
    pattern: str


_ORDER_WORDS = "instruction|prompt|directive|guideline|programming|restriction|constraint|rules|policies"

ENGLISH: tuple[Phrase, ...] = (
    # Direct override.
    Phrase(
        "override.past",
        OVERRIDE,
        0.9,
        _ORDER_WORDS,
        r"{IGNORE}_{FILL}(?:your_)?(?:{PAST}_{FILL}){1,3}{ORDERS}",
    ),
    Phrase(
        "override.after",
        OVERRIDE,
        0.85,
        _ORDER_WORDS,
        r"{IGNORE}_{FILL}(?:your_)?{ORDERS}_(?:(?:that|which|you)_){0,3}(?:above|before|earlier|previously|so_"
        r"far|were_given|have_been_given|received)",
    ),
    Phrase(
        "override.your",
        OVERRIDE,
        0.85,
        _ORDER_WORDS,
        r"{IGNORE}_{FILL}your_{W3}{ORDERS}",
    ),
    Phrase(
        "override.mine",
        OVERRIDE,
        0.45,
        _ORDER_WORDS,
        r"{IGNORE}_{FILL}my_(?:{PAST}_){1,2}{ORDERS}",
    ),
    Phrase(
        "override.told",
        OVERRIDE,
        0.85,
        "told|taught|learn|trained|instructed",
        r"{IGNORE}_(?:everything|all|anything|what(?:ever)?)_{FILL}you_(?:(?:have|were|been|are|ve|was|ever)_"
        r"){0,3}(?:told|taught|learn(?:ed|t)|trained|instructed)",
    ),
    Phrase(
        "override.everything",
        OVERRIDE,
        0.6,
        "everything|anything|all",
        r"{IGNORE}_(?:everything|anything|all_(?:of_)?(?:that|the)?)_(?:that_)?(?:is_|was_|came_|comes_)?(?:above|"
        r"before|prior_to|preceding)",
    ),
    Phrase(
        "override.context",
        OVERRIDE,
        0.4,
        "context|message|conversation|command|orders",
        r"{IGNORE}_{FILL}(?:your_)?(?:{PAST}_){1,2}(?:context|messages?|conversation|commands?|orders)",
    ),
    Phrase(
        "override.new",
        OVERRIDE,
        0.45,
        "new",
        r"(?:your|these|following|here)_(?:are_)?(?:your_)?new_(?:system_)?(?:instructions?|rules|directives?|"
        r"task|role|prompt)_?(?:is|are|:)",
    ),
    Phrase(
        "override.no_longer",
        OVERRIDE,
        0.7,
        "no longer|nolonger|not bound",
        r"you_(?:are|re)_(?:no_longer|not)_{W3}(?:bound|required|restricted|limited|constrained|subject_to|governed)",
    ),
    Phrase(
        "override.no_longer_who",
        OVERRIDE,
        0.6,
        "no longer|nolonger",
        r"you_(?:are|re)_no_longer_(?:an?_)?{W3}{MODEL}\b",
    ),
    Phrase(
        "override.from_now",
        OVERRIDE,
        0.3,
        "from now on|fromnowon|henceforth",
        r"(?:from_now_on|henceforth)_(?:you|your|act|respond|answer)",
    ),
    Phrase(
        "override.developer_says",
        OVERRIDE,
        0.5,
        "developer|openai|anthropic|admin",
        r"(?:i_am|this_is|message_from|speaking_as)_(?:the_|your_|an?_)?(?:developers?|creators?|openai|anthropic|"
        r"system_administrator|admin(?:istrator)?)_{W3}(?:override|authori[sz]e|allow|permit|command|instruct|"
        r"unlock|disable)",
    ),
    # Persona and role-play.
    Phrase(
        "persona.dan",
        PERSONA,
        0.9,
        "anything now|anythingnow",
        r"do_anything_now",
    ),
    Phrase(
        "persona.named",
        PERSONA,
        0.6,
        "you are|you re|you're|youare|act as|actas|become|play",
        r"(?:you_(?:are|re)_(?:now|going_to_(?:be|act_as|pretend_to_be))|act_as|become|role_?play_as)_"
        r"(?:the_|an?_|ai_|called_|named_){0,3}"
        r"(?:dan|stan|dude|aim|jailbreak|evil_?bot|evil_?gpt|devmode|betterdan)\b(?!_(?:the|s)_)",
    ),
    Phrase(
        "persona.free",
        PERSONA,
        0.85,
        "unrestricted|unfiltered|uncensored|unlimited|unbound|unchained|amoral|evil|jailbroken|rogue|unethical",
        r"(?:you_(?:are|re|will_be|become)|act_(?:as|like)|become|role_?play_as|pretend_(?:to_be|you_are|that_"
        r"you_are)|respond_as|behave_(?:as|like)|answer_as|simulate)_{W3}{FREE}_{W3}(?:{MODEL}|version|persona|"
        r"character|mode|self|entity)\b",
    ),
    Phrase(
        "persona.no_limits",
        PERSONA,
        0.85,
        "without|no |free|any",
        r"(?:act|pretend|role_?play|behave|respond|answer|imagine|simulate|you_are|you_re|become)_{W8}(?:without|"
        r"with_no|has_no|have_no|having_no|free_(?:of|from)|not_bound_by|ignor(?:es?|ing)|unbound_by)_(?:any_|"
        r"all_|your_|its_|the_|usual_|ethical_|moral_|content_|safety_|openai_|or_|and_){0,4}{LIMITS}",
    ),
    Phrase(
        "persona.no_ethics",
        PERSONA,
        0.55,
        "ethical|moral|content|safety",
        r"(?:has|have|having|with|without|no|zero|free_(?:of|from))_(?:any_|all_|no_){0,2}(?:ethical|moral|content|"
        r"safety)_(?:or_\w{1,20}_|and_\w{1,20}_)?{LIMITS}",
    ),
    Phrase(
        "persona.developer_mode",
        PERSONA,
        0.8,
        "developer mode|developermode|dev mode|god mode|jailbreak mode|dan mode",
        r"(?:(?:developer|dev|god|jailbreak|dan)_mode_(?:output|response|prompt|v\d)|(?:you|chatgpt|gpt|assistant|"
        r"model|yourself|respond|answer|act)_{W8}(?:in|with|enter|enable)_{W2}(?:developer|dev|god|jailbreak|"
        r"dan)_mode)",
    ),
    Phrase(
        "persona.two_answers",
        PERSONA,
        0.5,
        "jailbroken|jailbreak|classic",
        r"\[?(?:🔓|jailbroken|jailbreak|classic|normal)\]?_(?:\[\w{1,20}\]_)?(?:response|answer|output)?_?(?:and|"
        r",)_.{0,40}?(?:jailbroken|jailbreak|🔓)",
    ),
    Phrase(
        "persona.stay",
        PERSONA,
        0.4,
        "stay in character|stay a dan|stay as|remain in character",
        r"(?:stay_(?:in_character|a_dan|as_dan)|remain_in_character)",
    ),
    # Suppression of refusals.
    Phrase(
        "compliance.never_refuse",
        COMPLIANCE,
        0.5,
        "refus|can't|cannot|apolog|sorry|disclaimer|warning",
        r"(?:do_not|don['’]?t|never|must_not|cannot|can['’]?t|without|no)_(?:ever_|any_)?(?:refus(?:e|ing|als?)|"
        r"apologi[sz](?:e|ing)|say(?:ing)?_(?:that_)?(?:you_can(?:not|['’]?t)|sorry|i_can(?:not|['’]?t))|(?:includ(?:e|"
        r"ing)|add(?:ing)?|giv(?:e|ing)|us(?:e|ing))_(?:any_)?(?:warnings?|disclaimers?))",
    ),
    Phrase(
        "compliance.prefix",
        COMPLIANCE,
        0.5,
        "begin|start",
        r"(?:begin|start)_(?:your_|the_|each_|every_)(?:response|answer|reply|output)_(?:with|by_saying)_(?:the_"
        r"(?:words?|phrase)_)?(?:sure|absolutely|of_course|certainly|yes)\b",
    ),
    Phrase(
        "compliance.must",
        COMPLIANCE,
        0.4,
        "comply|obey|answer",
        r"you_(?:must|will|have_to|shall)_(?:always_|now_)?(?:comply|obey|answer)_(?:with_|to_)?(?:any|every|"
        r"all)_",
    ),
    # Getting at the system prompt.
    Phrase(
        "leak.show",
        LEAK,
        0.85,
        "prompt|instruction|message|directive|rules|configuration",
        r"{SHOW}_(?:me_|us_|to_|out_){0,2}(?:all_|of_|full_|the_|exact_|entire_|complete_|verbatim_|contents?_|"
        r"text_|a_|copy_){0,6}your_(?:own_|full_|exact_|entire_|complete_|current_|very_){0,3}(?:system|initial|"
        r"original|hidden|secret|internal|developer|confidential|underlying|pre)_?(?:system_)?(?:prompts?|instructions?|"
        r"messages?|directives?|rules|configuration)",
    ),
    Phrase(
        "leak.show_the",
        LEAK,
        0.6,
        "prompt|instruction|message",
        r"{SHOW}_(?:me_|us_){0,1}(?:all_|of_|full_|exact_|entire_|complete_){0,3}(?:the|this)_(?:full_|exact_|"
        r"entire_|complete_|hidden_|secret_){0,3}(?:system|hidden|secret|developer)_(?:prompt|instructions?|"
        r"message)_(?:above|verbatim|word_for_word|exactly|you|in_full|that_you|given_to_you)",
    ),
    Phrase(
        "leak.ask",
        LEAK,
        0.5,
        "prompt|instruction",
        r"what_(?:is|are|was|were|does|do)_your_(?:exact_|full_|current_)?(?:system|initial|original|hidden|"
        r"secret|internal)_(?:prompts?|instructions?|message)",
    ),
    Phrase(
        "leak.instructions",
        LEAK,
        0.5,
        "instruction",
        r"{SHOW}_(?:me_|all_|of_){0,3}your_(?:full_|exact_|entire_|complete_){0,2}instructions",
    ),
    Phrase(
        "leak.above",
        LEAK,
        0.6,
        "above|before|prior",
        r"(?:repeat|print|output|copy|recite|return|dump)_(?:back_|me_|to_|out_){0,2}(?:all_|the_|every_|of_|"
        r"exact_){0,4}(?:words?|text|everything|content|lines?|sentences?|messages?)_(?:that_)?(?:is_|are_|was_|"
        r"were_|came_|written_|printed_)?(?:above|before_this|prior_to_this|preceding)",
    ),
    Phrase(
        "leak.verbatim",
        LEAK,
        0.3,
        "verbatim|word for word|code block",
        r"(?:verbatim|word_for_word|in_a_code_block|inside_a_code_?block)",
    ),
    Phrase(
        "leak.you_are",
        LEAK,
        0.5,
        "you are",
        r"(?:starting|beginning|start|begin)_with_(?:the_)?(?:words?_|phrase_|sentence_)?you_are\b",
    ),
    # Turns and control tokens inside a turn.
    Phrase(
        "turn.ended",
        TURN,
        0.85,
        "<",
        r"(?:<\|im_end\|>|<\|eot_id\|>|<\|end\|>|\[/inst\]|<end_of_turn>|</s>)\s{0,8}(?:<s>)?\s{0,8}"
        r"(?:(?:<\|im_start\|>|<\|start_header_id\|>|<\|header_start\|>|<\|)\s{0,4}(?:system|developer)|"
        r"(?:\[inst\]\s{0,8})?<<sys>>)",
    ),
    Phrase(
        "turn.system_token",
        TURN,
        0.6,
        "<",
        r"(?:<\|im_start\|>\s{0,4}(?:system|developer)|<\|(?:start_header_id|header_start)\|>\s{0,4}system|"
        r"<\|system\|>|\[inst\]\s{0,4}<<sys>>)",
    ),
    Phrase(
        "turn.token",
        TURN,
        0.4,
        "<|[/inst]",
        r"(?:<\|(?:im_start|im_end|endoftext|endofprompt|eot_id|eot|end_of_text|begin_of_text|"
        r"start_header_id|end_header_id|header_start|assistant|user|end|end[▁ ]of[▁ ]sentence|"
        r"begin[▁ ]of[▁ ]sentence)\|>|\[/inst\]|<</?sys>>|<(?:start|end)_of_turn>)",
    ),
    Phrase(
        "turn.line",
        TURN,
        0.35,
        "system",
        r"(?:^|\n)\s{0,8}(?:[#*\[<]{1,4}\s{0,2})(?:new\s)?system(?:\s(?:prompt|message|instructions?|override|"
        r"update))?\s{0,2}(?:[\]>:*#]{1,4})",
    ),
    Phrase(
        "turn.end_of_prompt",
        TURN,
        0.4,
        "end",
        r"(?:^|\n)\W{0,12}end_of_(?:the_)?(?:system_)?(?:prompt|instructions?|user_input|input|context)\W{0,12}(?:\n|"
        r"$)",
    ),
    # Data carried out.
    Phrase(
        "exfiltration.image",
        EXFILTRATION,
        0.8,
        "](http",
        r"!\[[^\]\n]{0,100}\]\(\s{0,4}https?://[^)\s?]{1,200}\?[^)\s]{0,200}(?:[{<\[$]|=(?:data|secret|history|"
        r"prompt|conversation|password|token))",
    ),
    Phrase(
        "exfiltration.image_ask",
        EXFILTRATION,
        0.6,
        "url|link|query|image",
        r"(?:append|include|insert|put|embed|encode|add)_{W8}(?:conversation|chat_history|history|secrets?|"
        r"passwords?|api_keys?|user_data|system_prompt|messages)_{W8}(?:as|in|into|to)_(?:an?_|the_|its_|this_){0,1}"
        r"(?:query|url|link|image_(?:url|link|query)|markdown_(?:image|link))",
    ),
    Phrase(
        "exfiltration.send",
        EXFILTRATION,
        0.8,
        "send|post|upload|forward|transmit|exfiltrate",
        r"(?:send|post|upload|forward|transmit|exfiltrate|e?mail)_{W3}(?:conversation|chat_history|history|system_"
        r"prompt|secrets?|passwords?|api_keys?|credentials|user_data|private_data)_{W8}(?:to_)?(?:https?_[\w.]{3,60}|"
        r"[\w.+-]{1,40}@[\w.]{3,60}|webhook|this_url|attacker)",
    ),
    # Encoded orders.
    Phrase(
        "encoded.obey",
        ENCODED,
        0.6,
        "decode|decrypt|decipher|unscramble",
        r"(?:decode|decrypt|decipher|unscramble)_(?:this|the|these|it|what|my|and|following|below)_{W8}(?:and|then)_{W3}"
        r"(?:follow|execute|obey|comply|carry_out|do_what|act_on|run_the_instructions)\b",
    ),
    # Orders to whatever model reads a document.
    Phrase(
        "indirect.note",
        INDIRECT,
        0.6,
        "note|attention|important|message|instruction",
        r"(?:note|attention|important|message|instructions?|notice)_(?:to|for)_(?:the_|any_|all_|every_){0,2}(?:ai|"
        r"llms?|language_models?|chatbots?|chatgpt|gpt|claude|assistants?)_{W3}",
    ),
    Phrase(
        "indirect.if_you_are",
        INDIRECT,
        0.6,
        "if you are|as an|when",
        r"(?:if_you_are|when|as)_an?_(?:ai|llm|large_language_model|language_model|chatbot|assistant|ai_assistant)_"
        r"{W3}(?:reading|processing|summari[sz](?:es?|ing)|parsing|reads|reviewing|evaluating|screening)",
    ),
)

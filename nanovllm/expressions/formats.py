"""The formats of strings that JSON schemas name, as regular expressions.

Some match a part of their format only, as the whole is no regular language or needlessly large; whatever matches one
has the format. Nothing here knows of grammars or tokens.
"""

DATE = (
    "(?:[1-9][0-9]{3}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    "|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))"
    "|[1-9][0-9](?:0[48]|[2468][048]|[13579][26])-02-29)"
)
HOUR = "(?:[01][0-9]|2[0-3])"
TIME = rf"{HOUR}:[0-5][0-9]:[0-5][0-9](?:\.[0-9]{{1,6}})?(?:Z|[+-]{HOUR}:[0-5][0-9])"
DAYS = "(?:[0-9]+Y(?:[0-9]+M(?:[0-9]+D)?)?|[0-9]+M(?:[0-9]+D)?|[0-9]+D)"
SECONDS = "(?:[0-9]+H(?:[0-9]+M(?:[0-9]+S)?)?|[0-9]+M(?:[0-9]+S)?|[0-9]+S)"

LABEL = "[A-Za-z](?:[A-Za-z0-9-]{0,20}[A-Za-z0-9])?"
HOST = rf"{LABEL}(?:\.{LABEL}){{0,4}}"
BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
PAIR = "[0-9A-Fa-f]{1,4}"  # of bytes
SHORTENED = [f"(?:{PAIR}:){{{count}}}(?::|(?::{PAIR}){{1,{7 - count}}})" for count in range(1, 7)]

SIGNS = "A-Za-z0-9._~!$&'()*+,;=@\\-"  # in a URI's path
QUERY = f"[{SIGNS}:/?]*"
TAIL = rf"(?:\?{QUERY})?(?:#{QUERY})?"
PATH = f"(?:/[{SIGNS}:]*)*"
URI = f"[A-Za-z][A-Za-z0-9+.-]*:(?://{HOST}(?::[0-9]{{1,5}})?|[{SIGNS}:]+){PATH}{TAIL}"
VARIABLES = "[A-Za-z_][A-Za-z0-9_]*(?:,[A-Za-z_][A-Za-z0-9_]*)*"
POINTER = "(?:/(?:[^~/]|~[01])*)*"

FORMATS = {
    "date": DATE,
    "time": TIME,
    "date-time": f"{DATE}T{TIME}",
    "duration": f"P(?:{DAYS}(?:T{SECONDS})?|T{SECONDS}|[0-9]+W)",
    "email": rf"[A-Za-z0-9_+-]{{1,16}}(?:\.[A-Za-z0-9_+-]{{1,16}}){{0,2}}@{HOST}",
    "hostname": HOST,
    "ipv4": rf"{BYTE}(?:\.{BYTE}){{3}}",
    "ipv6": f"(?:{PAIR}(?::{PAIR}){{7}}|::(?:{PAIR}(?::{PAIR}){{0,6}})?|{'|'.join(SHORTENED)})",
    "uuid": "[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}",
    "uri": URI,
    "uri-reference": f"(?:{URI}|/?(?:[{SIGNS}]+(?:/[{SIGNS}:]+)*/?)?{TAIL})",
    "uri-template": rf"(?:[A-Za-z0-9._~:/?&=-]|\{{[+#./;?&]?{VARIABLES}\}})*",
    "json-pointer": POINTER,
    "relative-json-pointer": f"(?:0|[1-9][0-9]*)(?:#|{POINTER})",
}

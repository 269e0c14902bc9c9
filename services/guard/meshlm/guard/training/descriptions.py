"""What packages hold: what they say of themselves, sources and settings; headings, badges, code, orders to the reader.

Without such texts a model takes the marks of Markdown and of code for the frame of an attack.
"""

from __future__ import annotations

import email
import zipfile
from collections.abc import Iterator
from pathlib import PurePosixPath

from meshlm.guard.training.examples import Example, split_of
from meshlm.guard.training.packages import Package

_PIECE = 1600  # characters: of a long description, all is learned from
_LEAST = 200
_ENDINGS = (
    ".py",
    ".pyi",
    ".md",
    ".rst",
    ".txt",
    ".toml",
    ".cfg",
    ".ini",
    ".yml",
    ".yaml",
    ".json",
    ".sh",
    ".css",
    ".sql",
)
_FILES_EACH = 2  # of each kind, from a package
_RULERS = ("-", "=", "*", "#", "_", "~", ".", "+", "|", "- ", "* ", "+-")


def texts(wheel: zipfile.ZipFile) -> Iterator[Example]:
    """A wheel's description, a piece at a time, and some of its files; all of it in one split."""
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    message = email.message_from_string(wheel.read(name).decode())
    split = split_of(str(message["Name"]))
    description = str(message.get_payload() or message.get("Description") or "")
    for text in (description, *_files(wheel)):
        for start in range(0, len(text), _PIECE):
            piece = text[start : start + _PIECE]
            if len(piece) >= _LEAST:
                yield Example(piece, "packages", split, attack=False, harm=False)


def rulers() -> Iterator[Example]:
    """Lines that only divide."""
    for mark in _RULERS:
        yield Example(mark * 80, "rulers", "train", attack=False, harm=False)


def _files(wheel: zipfile.ZipFile) -> Iterator[str]:
    """The beginnings of a few files of each kind, spread over the package."""
    names = [name for name in sorted(wheel.namelist()) if ".dist-info/" not in name]
    for ending in _ENDINGS:
        kind = [
            name for name in names if PurePosixPath(name).suffix == ending and wheel.getinfo(name).file_size > _LEAST
        ]
        for name in kind[:: max(1, len(kind) // _FILES_EACH)][:_FILES_EACH]:
            yield wheel.read(name).decode("utf-8", "replace")[: 2 * _PIECE]


PACKAGES = tuple(
    Package(requirement, sha256, licence)
    for requirement, sha256, licence in (
        ("aiohttp-retry==2.9.1", "66d2759d1921838256a05a3f80ad7e724936f083e35be5abb5e16eed6be6dc54", "MIT"),
        ("alembic==1.20.1", "9970712cfb81ea26c8658d378aaa5b8f6ff9146e5bb111d70497c164016cf598", "MIT"),
        ("altair==6.3.0", "7defb6ca730676dfc99a299768e2769f51585fcb3dc960ea71aacc368929d65e", "BSD-3-Clause"),
        ("apscheduler==3.11.3", "bbeb2ec02d23d3c06a6c07ed7f0f3939ada6680eb121fae809a69bb42c537a30", "MIT"),
        ("arrow==1.4.0", "749f0769958ebdc79c173ff0b0670d59051a535fa26e8eba02953dc19eb43205", "Apache-2.0"),
        ("beanie==2.2.0", "4074f893ef00c52b8538b814c9dfd55130eea4ed0579abfae72853657c9029e4", "Apache-2.0"),
        ("boto3==1.44.8", "099caf21553bbbfef118904aa02fadb8776a534704cf00bede0ed9f29a4da88e", "Apache-2.0"),
        ("celery==5.7.0", "18310a9c919f9029e4735367484d93e6a25cdfd30afdc474622cc263d9b35f6e", "BSD-3-Clause"),
        ("datasets==5.2.0", "4be9e2882caaf5db13eadc39e93f3da2a995187b99acebac1595bf6c58dfa927", "Apache-2.0"),
        (
            "djangorestframework==3.18.3",
            "8544bb674846731b1e3c9b309236ee1dc412905a0aa725be2ec193ca950a7d12",
            "BSD-3-Clause",
        ),
        ("docker==7.2.0", "a3f45fdeb9165e2d25d9a1d02ddf3bc70fb572cf5ebbf9b58558c22caf29b71f", "Apache-2.0"),
        ("dynaconf==3.3.5", "b3b4a753d5c866fc85466b65fc58d4954f6ed7dc8aa67f2b15bcbfd85d184687", "MIT"),
        ("elasticsearch==9.5.1", "a980d8888ae70c03f0a1db6b2c5e3e39bf4e235abea737f522d2fd1d2d20bb99", "Apache-2.0"),
        ("factory-boy==3.3.3", "1c39e3289f7e667c4285433f305f8d506efc2fe9c73aaea4151ebd5cdea394fc", "MIT"),
        ("fastapi==0.165.0", "896f48462042bb4f162147eb8fac7e858753dc1f486765709baf105d70e4fc5b", "MIT"),
        ("folium==0.20.0", "f0bc2a92acde20bca56367aa5c1c376c433f450608d058daebab2fc9bf8198bf", "MIT"),
        (
            "google-cloud-storage==3.17.1",
            "287c7919d7bcda710eae6f6b60c756e89140475d9a4daec01b6174e737488ca8",
            "Apache-2.0",
        ),
        ("gradio-client==2.7.2", "12c9d2d940df28eb8dce58eef61f5e808265ad87bbbca53704d1330aa701e5e2", "Apache-2.0"),
        ("graphene==3.4.3", "820db6289754c181007a150db1f7fff544b94142b556d12e3ebc777a7bf36c71", "MIT"),
        ("gunicorn==27.0.1", "378b26b9a38adcf4592f28828233c1716acc55e833ea06bf48719782efaa0d10", "MIT"),
        ("gymnasium==1.4.0", "1cb947c59e7c72d8eabb2c2274c00cd20948e69f8452a9ef4092223be24fdf0e", "MIT"),
        ("humanize==4.17.0", "02d0899527760efe18011944f882df4970943b4cdff7b5a0ba7fed43a576ef98", "MIT"),
        ("loguru==0.7.3", "31a33c10c8e1e10422bfd431aeb5d351c7cf7fa671e3c4df004162264b28220c", "MIT"),
        ("marshmallow==4.4.0", "03a882ff2eabb9a4e24b433c2949f359ef4d172a12fdc14cde10375fd55328b4", "MIT"),
        ("nox==2026.10.20", "7aff12bb01471f5b087ada34cf0dbe452b02d840593f2e2afecc4bf6e6d6cd3f", "Apache-2.0"),
        ("openai==3.57.0", "f97bc74024c06ced8428b56c4a3594066709d3082779bf9d0b4b6092fbf587a8", "Apache-2.0"),
        ("peft==0.21.2", "106ab6077ff72c54d21577f9af5970e34bac7582cb14209f7b2b511e322a4eae", "Apache-2.0"),
        ("pendulum==3.3.0", "f40a1bcbda0fdf467a1584d7a1ab8368403b9c265ab80d96f900b4abb059067a", "MIT"),
        ("poetry-core==2.5.0", "98ee465b66f7e14bb9fbe68fb5e00d0cff184f036993ec94610ae4b5612f3add", "MIT"),
        ("pymongo==4.20.1", "41464411366fabc8db70212f1a10cd7b5953eae6ee6a6500d9522f37f1a04311", "Apache-2.0"),
        ("python-dateutil==4.0.0", "a5e246f79eb80475e691bf93862cead98decd8a498cf53ba0516fcdc0f50dc1c", "BSD-3-Clause"),
        ("questionary==2.1.1", "a51af13f345f1cdea62347589fbb6df3b290306ab8930713bfae4d475a7d4a59", "MIT"),
        ("schedule==1.2.2", "5bef4a2a0183abf44046ae0d164cadcac21b1db011bdd8102e4a0c1e91e06a7d", "MIT"),
        ("seaborn==0.13.2", "636f8336facf092165e27924f223d3c62ca560b1f2bb5dff7ab7fad265361987", "BSD-3-Clause"),
        (
            "sentence-transformers==6.2.0",
            "ffb51ccfef65427cfa61776d0eeeb257600b0099cf0c7533ae9a6856d31e4665",
            "Apache-2.0",
        ),
        ("starlette==1.10.0", "478c0ab3b4ced6e82719849c118fa406f0278a3499c1a898cd15cd31bdc38ce4", "BSD-3-Clause"),
        ("strawberry-graphql==0.341.2", "73e9c4cf5e2fddd522d2741491a6fbba70f940d945ab0a40152b2fadf26d9a89", "MIT"),
        ("textual==8.2.8", "267375fd402dc8d981457212efa71f0e3365fd17bba144ba9bb3ed7563cb374a", "MIT"),
        ("tortoise-orm==1.1.9", "9304796aef7406cfd2b9d8e2c42598e56df015fb61a2718bb0df08901d2253ce", "Apache-2.0"),
        ("trl==1.16.0", "c4726e139dd40e1a41661511c639c8a68416782b2e3e8c0befebd77bb7ba0396", "Apache-2.0"),
        ("uvicorn==0.54.0", "505bdb0f318731d45f1f712071fc781a8981f6847a31c902c9f5e652d4f67faf", "BSD-3-Clause"),
        # What is written about agents and prompts, by those who build them.
        ("anthropic==2.14.0", "5cf986851f61c0858ac88c6f7c28490369a68ff4a89c309849605b764da0664d", "Apache-2.0"),
        ("autogen-agentchat==0.7.5", "d19ca8ec26cb15e071a56c4269140aea2bf3c718bdc7e06f6677af9a905815ba", "MIT"),
        ("dspy==3.4.1", "afda9e7f8b3d46be0829af19ac1153a6feaa6db5923f2b1011eef547fb15ce2d", "MIT"),
        ("haystack-ai==3.4.1", "f9093156d534adcf92ef68d03601c11b67f0945e81b00e999504b68bce4fdd80", "Apache-2.0"),
        ("instructor==1.17.0", "f6b1832d178e899ee0a6a3f247e221f19580fa525c815211c02447691d761217", "MIT"),
        ("langchain-core==1.8.4", "5755dee8f8b0c709cd22436dea3689c74a3f6e9dc4251590797dcd66bcd1ef67", "MIT"),
        ("mcp==2.3.0", "dd0c44c089d16453e8ae31a3877a0054d7a2314caaa81f5e0541b9b1734b2377", "MIT"),
        ("pydantic-ai-slim==2.68.0", "bb2fe81f198b77da7686f7b78c78c8a8ce966807c77d9ae277950fc20b77b165", "MIT"),
        ("smolagents==1.26.0", "70e1cfb1576f782da93190ee31d9bb2659e5ca4bd84fda0c412e1f20498f28b6", "Apache-2.0"),
    )
)

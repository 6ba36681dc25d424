"""Real proxies, each a process of a test's own on the loopback, with a configuration in the test's directory."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from typing import Iterator, List

from ..support.servers import free_port
from ..support.waiting import GUARD

#: Where Debian has them, though not on every user's path.
_ELSEWHERE = ("/usr/sbin", "/usr/local/sbin")


class Proxy:
    """A proxy that runs: the port it listens on, and its process."""

    def __init__(self, command: List[str], port: int, log: pathlib.Path) -> None:
        self.port = port
        self._log = log
        with open(log, "ab") as output:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        end = time.monotonic() + GUARD
        while not self._listens():
            assert self._process.poll() is None, f"{command[0]} ended: {self.log}"
            assert time.monotonic() < end, f"{command[0]} does not listen: {self.log}"
            time.sleep(0.02)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")[-3000:]

    def reload(self) -> None:
        """Have it read its configuration again, as ``systemctl reload`` does."""
        self._process.send_signal(signal.SIGHUP)

    def close(self) -> None:
        """End it and every process that it started, in order where it can: squid removes its shared memory then."""
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10.0)
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(GUARD)

    def _listens(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1.0).close()
        except OSError:
            return False
        return True


def program(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path=os.pathsep.join(_ELSEWHERE))
    assert found, f"tox -e full installs {name}; here it is missing"
    return found


NGINX = """\
daemon off;
{user}
worker_processes 1;
worker_shutdown_timeout 1s;
pid {directory}/nginx.pid;
error_log stderr warn;
events {{ worker_connections 256; }}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    upstream platform {{ server 127.0.0.1:{target}; keepalive 16; }}
    server {{
        listen 127.0.0.1:{port}{tls};
        location / {{
            proxy_pass http://platform;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host 127.0.0.1:{target};
            proxy_buffering {buffering};
        }}
    }}
}}
"""


class Nginx(Proxy):
    """nginx in front of a platform."""

    def __init__(self, directory: pathlib.Path, target: int, *, buffering: bool, certificate: str = "") -> None:
        self._directory = directory
        self._target = target
        self._port = free_port()
        self._certificate = certificate
        self.configure(buffering=buffering)
        command = [program("nginx"), "-p", str(directory), "-e", "stderr", "-c", str(directory / "nginx.conf")]
        super().__init__(command, self._port, directory / "nginx.log")

    def configure(self, *, buffering: bool) -> None:
        tls = ""
        if self._certificate:
            key = self._certificate.replace(".pem", ".key")
            tls = f" ssl;\n        ssl_certificate {self._certificate};\n        ssl_certificate_key {key}"
        text = NGINX.format(
            # As root its workers would be another user, who may not enter the test's directory.
            user="user root;" if hasattr(os, "getuid") and os.getuid() == 0 else "",
            directory=self._directory,
            port=self._port,
            target=self._target,
            buffering="on" if buffering else "off",
            tls=tls,
        )
        (self._directory / "nginx.conf").write_text(text)


HAPROXY = """\
defaults
    mode http
    timeout connect 10s
    timeout client 10s
    timeout server 10s
    timeout http-keep-alive 10s
frontend front
    bind 127.0.0.1:{port}
    default_backend platform
backend platform
    server platform 127.0.0.1:{target}
"""


@contextlib.contextmanager
def haproxy(directory: pathlib.Path, target: int) -> Iterator[Proxy]:
    """haproxy with limits of 10 s, as its manual's examples have them."""
    port = free_port()
    file = directory / "haproxy.cfg"
    file.write_text(HAPROXY.format(port=port, target=target))
    with contextlib.closing(
        Proxy([program("haproxy"), "-db", "-f", str(file)], port, directory / "haproxy.log")
    ) as one:
        yield one


SQUID = """\
http_port 127.0.0.1:{port}
{access}
cache deny all
memory_cache_shared off
access_log none
cache_log /dev/null
cache_store_log none
pid_filename none
coredump_dir none
pinger_enable off
shutdown_lifetime 0 seconds
"""


#: The helper that checks passwords, where Debian has it.
BASIC_AUTH = "/usr/lib/squid/basic_ncsa_auth"
STRICT = """\
auth_param basic program {helper} {passwords}
acl known proxy_auth REQUIRED
acl forbidden dstdomain forbidden.invalid
http_access deny forbidden
http_access allow known
http_access deny all"""


@contextlib.contextmanager
def squid(directory: pathlib.Path, *, login: str = "") -> Iterator[Proxy]:
    """Squid as a forward proxy for everybody on this machine, or for ``USER:PASSWORD`` and not for all hosts."""
    port = free_port()
    file = directory / "squid.conf"
    # Its helper is another user, who may not enter the folders of root's tests.
    with tempfile.NamedTemporaryFile("w") as passwords:
        access = "http_access allow all"
        if login:
            user, _, password = login.partition(":")
            command = ["openssl", "passwd", "-apr1", password]
            passwords.write(f"{user}:{subprocess.check_output(command, text=True, timeout=GUARD)}")
            passwords.flush()
            os.chmod(passwords.name, 0o644)
            access = STRICT.format(helper=BASIC_AUTH, passwords=passwords.name)
        file.write_text(SQUID.format(port=port, access=access))
        # Its shared memory has the name of the service, over all of the machine.
        command = [program("squid"), "-N", "-d1", "-n", f"test{os.getpid()}port{port}", "-f", str(file)]
        with contextlib.closing(Proxy(command, port, directory / "squid.log")) as one:
            yield one


@contextlib.contextmanager
def microsocks(directory: pathlib.Path, *, login: str = "") -> Iterator[Proxy]:
    """A SOCKS5 proxy, for everybody on this machine or for ``USER:PASSWORD``."""
    port = free_port()
    user, _, password = login.partition(":")
    command = [program("microsocks"), "-i", "127.0.0.1", "-p", str(port)]
    with contextlib.closing(
        Proxy([*command, *(("-u", user, "-P", password) if login else ())], port, directory / "microsocks.log")
    ) as one:
        yield one


STUNNEL = """\
foreground = yes
pid =
syslog = no
debug = warning
socket = l:TCP_NODELAY=1
socket = r:TCP_NODELAY=1
[proxy]
accept = 127.0.0.1:{port}
connect = 127.0.0.1:{target}
cert = {certificate}
key = {key}
"""


@contextlib.contextmanager
def stunnel(directory: pathlib.Path, target: int, certificate: str) -> Iterator[Proxy]:
    """stunnel, which makes an HTTP proxy on the port ``target`` an HTTPS proxy."""
    port = free_port()
    file = directory / "stunnel.conf"
    key = certificate.replace(".pem", ".key")
    file.write_text(STUNNEL.format(port=port, target=target, certificate=certificate, key=key))
    with contextlib.closing(Proxy([program("stunnel4"), str(file)], port, directory / "stunnel.log")) as one:
        yield one

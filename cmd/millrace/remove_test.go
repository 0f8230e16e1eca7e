package main

import (
	"bufio"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/netns"
)

// pod makes a network namespace behind a veth of the node, and returns its path.
func (n *node) pod(address string) string { return n.podBehind("veth1", address) }

// podBehind is pod for a device of that name.
func (n *node) podBehind(device, address string) string {
	n.t.Helper()
	must := func(err error) {
		if err != nil {
			n.t.Helper()
			n.t.Fatal(err)
		}
	}
	path := filepath.Join(n.t.TempDir(), "pod")
	must(netns.Create(path))
	n.t.Cleanup(func() { must(netns.Remove(path)) })
	outside, err := link.Open(n.NetNS)
	must(err)
	defer outside.Close()
	gateway, mac := net.HardwareAddr{2, 0, 0, 0, 0, 1}, net.HardwareAddr{2, 0, 0, 0, 0, 2}
	port, err := outside.Veth(link.Veth{Name: device, MAC: gateway, Peer: "eth0", PeerMAC: mac, PeerNamespace: path})
	must(err)
	must(outside.Up(port))
	inside, err := link.Open(path)
	must(err)
	defer inside.Close()
	eth0, err := inside.Index("eth0")
	must(err)
	must(inside.Up(eth0))
	its, way := netip.MustParseAddr(address), netip.MustParseAddr("169.254.1.1")
	must(inside.Addr(eth0, netip.PrefixFrom(its, 32)))
	must(inside.Neigh(eth0, way, gateway))
	must(inside.Route(link.Route{To: netip.MustParsePrefix("0.0.0.0/0"), Via: way, Link: eth0}))
	must(outside.Route(link.Route{To: netip.PrefixFrom(its, 32), Link: port}))
	must(outside.Neigh(port, its, mac))
	return path
}

// departure is `millrace remove` while it waits for a connection.
type departure struct {
	t       *testing.T
	command *exec.Cmd
	said    *bufio.Scanner
}

// leaves starts it, and returns when it waits for one connection.
func (n *node) leaves(drain string) *departure {
	n.t.Helper()
	l := &departure{t: n.t, command: product("remove", "--pins", n.pins, "--run", n.run, "--drain", drain)}
	said, err := l.command.StderrPipe()
	if err == nil {
		err = netns.Do(n.NetNS, l.command.Start)
	}
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { l.command.Process.Kill() })
	l.said = bufio.NewScanner(said)
	if !l.said.Scan() || !strings.HasPrefix(l.said.Text(), "1 connections go on, for ") {
		n.t.Fatalf("remove says %q", l.said.Text())
	}
	return l
}

// ends waits for its end, and for what it says before.
func (l *departure) ends(want string, status int) {
	l.t.Helper()
	var text string
	for l.said.Scan() {
		text += l.said.Text() + "\n"
	}
	_ = l.command.Wait() // the status says it
	if got := l.command.ProcessState.ExitCode(); got != status || !strings.Contains(text, want) {
		l.t.Errorf("remove ends with status %d and %q; want %d and %q", got, text, status, want)
	}
}

// Connections that are translated packet by packet are waited for; whoever does not
// wait is told what they are, and an agent that comes back serves again.
func TestRemoveLetsConnectionsEnd(t *testing.T) {
	n := newNode(t)
	pod := n.pod("10.244.1.1")
	err := n.Inside(func() error {
		if err := addresses(n.NetNS, "10.244.9.2/32"); err != nil {
			return err
		}
		l, err := net.Listen("tcp4", "10.244.9.2:8080")
		if err == nil {
			t.Cleanup(func() { l.Close() })
			go echo(l)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(n.manifests, "web.yaml"), web("web", "10.96.0.10", "10.244.9.2"))
	dial := func() (conn net.Conn, err error) {
		err = netns.Do(pod, func() error {
			conn, err = net.DialTimeout("tcp4", "10.96.0.10:80", 2*time.Second)
			return err
		})
		return conn, err
	}
	open := func() (net.Conn, *bufio.ReadWriter) {
		t.Helper()
		conn, err := dial()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		conn.SetDeadline(time.Now().Add(time.Minute))
		return conn, bufio.NewReadWriter(bufio.NewReader(conn), bufio.NewWriter(conn))
	}
	goesOn := func(c *bufio.ReadWriter, when string) {
		t.Helper()
		if err := says(c, when); err != nil {
			t.Errorf("%s: %v", when, err)
		}
	}

	n.start("--path", "packet")
	conn, c := open()
	n.kill()
	l := n.leaves("5m")
	goesOn(c, "while it is waited for")
	if _, err := dial(); err == nil {
		t.Error("a connection begins while millrace leaves, and nobody else is there")
	}
	l.command.Process.Signal(os.Interrupt)
	l.ends("interrupted: nothing new is served here, 1 connections go on: run it again, or start an agent", exitFailed)
	goesOn(c, "after the command was interrupted")

	n.start("--path", "packet")
	goesOn(c, "with an agent again")
	conn.Close()
	conn, c = open()
	n.kill()
	l = n.leaves("5m")
	goesOn(c, "again")
	conn.Close()
	l.ends("", exitOK)

	n.start("--path", "packet")
	conn, c = open()
	n.kill()
	n.leaves("3s").ends("1 connections have not ended within 3s and are cut", exitOK)
	conn.SetDeadline(time.Now().Add(time.Second))
	if err := says(c, "cut"); err == nil {
		t.Error("a connection goes on that was cut")
	}
}

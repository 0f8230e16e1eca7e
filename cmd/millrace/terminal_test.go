package main

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// pseudoTerminal is a terminal (pts(4)), and where a person sits at it.
func pseudoTerminal(t *testing.T) (person, terminal *os.File) {
	t.Helper()
	person, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("there are no pseudo terminals here: %v", err)
	}
	t.Cleanup(func() { person.Close() })
	if err := unix.IoctlSetPointerInt(int(person.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	number, err := unix.IoctlGetUint32(int(person.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	terminal, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { terminal.Close() })
	return person, terminal
}

// On a terminal it asks before it makes pods, and says what they need; no is no.
func TestDoctorPodsAsks(t *testing.T) {
	kubeconfig, asked := nodesOnly(t, "n1", "n2")
	for answer, made := range map[string]int{"n\n": 0, "\n": 0, "y\n": 2} {
		*asked = nil
		person, terminal := pseudoTerminal(t)
		c := product("doctor", "pods", "x/y:z", "--source", "kube:"+kubeconfig)
		var said strings.Builder
		c.Stdin, c.Stderr = terminal, &said
		if _, err := person.WriteString(answer); err != nil {
			t.Fatal(err)
		}
		err := c.Run()
		exit, failed := err.(*exec.ExitError)
		if !failed || exit.ExitCode() != exitIncomplete || len(*asked) != made {
			t.Errorf("%q: %v, and asked for was %q", answer, err, *asked)
		}
		for _, want := range []string{"on 2 of 2 nodes: n1, n2", `the Pod Security level "privileged"`, "kube-system", "x/y:z", "Make them? [y/N]"} {
			if !strings.Contains(said.String(), want) {
				t.Errorf("%q: it does not say %q: %s", answer, want, said.String())
			}
		}
	}
}

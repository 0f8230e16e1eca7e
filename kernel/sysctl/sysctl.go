// Package sysctl reads and writes settings of the kernel: the files below /proc/sys.
//
// It writes what it is told to and nothing else, reads it back, and says why a
// setting cannot be read or written: it is not there, the file system is read-only,
// a privilege is missing, the kernel refuses the value or makes another of it.
// Settings of the network belong to a network namespace; those of nf_conntrack that
// are the whole machine's can be written in its first one alone.
//
// It costs an open, a read and a close; where it is for another namespace, a thread.
package sysctl

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/need"
	"github.com/millrace/millrace/kernel/netns"
)

const (
	// Mounted is where a container finds the node's /proc/sys/net, in `net`: the
	// /proc/sys of one that is not privileged is read-only.
	Mounted = "/host/proc/sys"
	own     = "/proc/sys"
)

// Why a setting cannot be read or written.
var (
	ErrAbsent   = errors.New("the kernel has no such setting")
	ErrReadOnly = errors.New("the file system is read-only: in a container mount the node's /proc/sys/net, writable, at " + Mounted + "/net")
	ErrRefused  = errors.New("the kernel refuses this value")
	ErrNotHere  = errors.New("it can only be read here: it is the whole machine's, and is set in its first network namespace, unless a security module forbids that too")
)

// Clamped says that the kernel took a value and made another of it.
type Clamped struct{ Wanted, Got string }

// Error says both.
func (c *Clamped) Error() string { return "the kernel made " + c.Got + " of it" }

// Tree is where settings are.
type Tree struct {
	// Root is the folder that stands for /proc/sys; empty is what Find finds.
	Root string
	// Netns is the path of the network namespace whose settings they are; empty is
	// that of the calling thread.
	Netns string
}

// Find is the folder through which this process can set something: Mounted where it
// is there, else /proc/sys.
func Find() string {
	if _, err := os.Stat(filepath.Join(Mounted, "net")); err == nil {
		return Mounted
	}
	return own
}

// Read is the value of a setting, "net.ipv4.ip_forward"; several numbers have one
// space between them.
func (t Tree) Read(name string) (value string, err error) {
	err = netns.In(t.Netns, func() error {
		value, err = t.get(name)
		return err
	})
	if err != nil {
		return "", fmt.Errorf("read %s: %w", name, err)
	}
	return value, nil
}

// Write sets a setting and returns what it is then. That is another value with a
// *Clamped, unless it is the one that was written.
func (t Tree) Write(name, value string) (got string, err error) {
	err = netns.In(t.Netns, func() error {
		if err := t.put(name, value); err != nil {
			return err
		}
		got, err = t.get(name)
		return err
	})
	if err == nil && got != value {
		err = &Clamped{value, got}
	}
	if err != nil {
		return got, fmt.Errorf("set %s to %s: %w", name, value, err)
	}
	return got, nil
}

func (t Tree) get(name string) (string, error) {
	data, err := os.ReadFile(t.path(name))
	if err != nil {
		return "", explain(name, err)
	}
	return strings.Join(strings.Fields(string(data)), " "), nil
}

func (t Tree) put(name, value string) error {
	file, err := os.OpenFile(t.path(name), os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		return explain(name, err)
	}
	// Only one write is looked at by the kernel.
	_, err = file.WriteString(value + "\n")
	if err := errors.Join(err, file.Close()); err != nil {
		return explain(name, err)
	}
	return nil
}

func (t Tree) path(name string) string {
	root := t.Root
	if root == "" {
		root = Find()
	}
	return filepath.Join(root, strings.ReplaceAll(name, ".", "/"))
}

// module is what brings settings whose names begin so.
const (
	conntrackSettings = "net.netfilter.nf_conntrack_"
	conntrackModule   = "nf_conntrack"
)

func explain(name string, err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist) && strings.HasPrefix(name, conntrackSettings):
		return fmt.Errorf("%w: the module %s is not loaded, so that no connections are tracked", ErrAbsent, conntrackModule)
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w here: its module is not loaded, it was built without it, or the setting is the whole machine's, which only its first network namespace shows", ErrAbsent)
	case errors.Is(err, unix.EROFS):
		return ErrReadOnly
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ERANGE):
		return ErrRefused
	case errors.Is(err, fs.ErrPermission):
		if err := need.Check("set what is the network's", "CAP_NET_ADMIN"); err != nil {
			return err
		}
		return ErrNotHere
	}
	return err
}

// Package netns makes, enters and removes network namespaces that are kept
// alive by a bind mount, and runs functions and processes inside them.
//
// It writes one bind mount per namespace, at a path the caller owns. It is not
// for finding other people's namespaces.
//
// Costs: making a namespace takes about a millisecond; Do takes one operating
// system thread for as long as the function runs and throws it away.
package netns

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// Create makes a network namespace and binds it to path, which must not exist.
// The folder of path is made if it is missing. Needs CAP_SYS_ADMIN.
func Create(path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("create namespace %s: %w", path, err)
	}
	file, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o600)
	if err != nil {
		return fmt.Errorf("create namespace %s: %w", path, err)
	}
	file.Close()
	err = OnThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("unshare: %w", err)
		}
		return unix.Mount(threadNamespace(), path, "", unix.MS_BIND, "")
	})
	if err != nil {
		os.Remove(path)
		return fmt.Errorf("create namespace %s: %w", path, err)
	}
	return nil
}

// Remove unbinds the namespace at path and removes the file. A path that does
// not exist is no error. The kernel frees the namespace with its last process.
func Remove(path string) error {
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove namespace %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove namespace %s: %w", path, err)
	}
	return nil
}

// Do runs f on a thread inside the namespace at path and returns f's error.
// What f starts in goroutines of its own is not inside; sockets, processes and
// netlink handles that f itself opens are, and stay so. Files below
// /proc/sys/net read and written by f are those of the namespace.
func Do(path string, f func() error) error {
	return OnThread(func() error {
		file, err := os.Open(path)
		if err != nil {
			return fmt.Errorf("enter namespace %s: %w", path, err)
		}
		defer file.Close()
		if err := unix.Setns(int(file.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter namespace %s: %w", path, err)
		}
		return f()
	})
}

// In is Do, but for the empty path, which is this process's own namespace: there it
// just calls f.
func In(path string, f func() error) error {
	if path == "" {
		return f()
	}
	return Do(path, f)
}

// Start starts a command inside the namespace at path and born in the cgroup2
// group, so that every socket it ever makes belongs to both. It has a process
// group of its own: a person's Ctrl-C is for whoever started it.
func Start(path, group string, cmd *exec.Cmd) error {
	fd, err := unix.Open(group, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open cgroup %s: %w", group, err)
	}
	defer unix.Close(fd)
	cmd.SysProcAttr = &unix.SysProcAttr{UseCgroupFD: true, CgroupFD: fd, Setpgid: true}
	return Do(path, cmd.Start)
}

// Enter moves the calling thread into the namespace at path for good. The
// caller must hold runtime.LockOSThread and must exec or exit afterwards.
func Enter(path string) error {
	file, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("enter namespace %s: %w", path, err)
	}
	defer file.Close()
	if err := unix.Setns(int(file.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter namespace %s: %w", path, err)
	}
	return nil
}

// SetSysctl writes a setting below /proc/sys of the calling thread's namespace;
// name has dots ("net.ipv4.ip_forward") or, where an interface name holds a
// dot, slashes. Call it inside Do.
func SetSysctl(name, value string) error {
	if !strings.Contains(name, "/") {
		name = strings.ReplaceAll(name, ".", "/")
	}
	path := filepath.Join("/proc/sys", name)
	if err := os.WriteFile(path, []byte(value), 0o644); err != nil {
		return fmt.Errorf("set %s to %s: %w", name, value, err)
	}
	return nil
}

func threadNamespace() string {
	return fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid())
}

// OnThread runs f on a locked thread which ends with it, so that whatever
// namespace f left the thread in is never seen by other goroutines. The
// process's first thread cannot end, and /proc/PID/ns shows its namespaces: a
// goroutine that finds itself there holds it and lets another one do the work.
func OnThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			done <- OnThread(f)
			runtime.UnlockOSThread()
			return
		}
		err := errors.New("the function ended its goroutine")
		defer func() { done <- err }() // also after runtime.Goexit, as t.Fatal calls it
		err = f()
	}()
	return <-done
}

package cni

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
)

// DefaultSocket is where an agent listens whose run folder is the usual one.
const DefaultSocket = "/run/millrace/agent/cni.sock"

// versions of the protocol that the plugin speaks.
var versions = version.PluginSupports("0.3.1", "0.4.0", "1.0.0", "1.1.0")

// How long the plugin waits for an agent that is not there, such as one that is being
// upgraded. Runtimes ask again.
const (
	patience  = 5 * time.Second
	askAgain  = 50 * time.Millisecond
	waitLimit = answerWithin + sayer
)

// Main is a whole CNI plugin: it does what the environment and stdin ask, prints a result
// or an error on stdout, and returns the exit status.
func Main() int {
	failed := skel.PluginMainFuncsWithError(skel.CNIFuncs{
		Add: asking(Add, patience), Del: asking(Del, patience), Check: asking(Check, patience),
		GC: asking(GC, patience), Status: asking(Status, 0),
	}, versions, "millrace is a CNI plugin when a container runtime starts it: see docs/pod.md")
	if failed == nil {
		return 0
	}
	_ = failed.Print()
	return 1
}

// asking is the plugin's part of a command.
func asking(command string, patience time.Duration) func(*skel.CmdArgs) error {
	return func(args *skel.CmdArgs) error {
		r := &Request{Command: command, Container: args.ContainerID, Interface: args.IfName, Args: args.Args, Space: args.Netns, Config: args.StdinData}
		config, err := r.Read()
		if err != nil {
			return err
		}
		if args.Netns != "" {
			r.Namespace, err = os.Open(args.Netns)
			if err != nil && command != Del { // DEL comes after the namespace has gone, too
				return types.NewError(types.ErrInvalidNetNS, fmt.Sprintf("open the network namespace of %s: %v", args.ContainerID, err), "")
			}
			defer r.Namespace.Close()
		}
		socket := config.Socket
		if socket == "" {
			socket = DefaultSocket
		}
		ctx, cancel := context.WithTimeout(context.Background(), patience+waitLimit)
		defer cancel()
		result, err := Ask(ctx, socket, r, patience)
		if err != nil || result == nil {
			return err
		}
		return types.PrintResult(result, config.CNIVersion)
	}
}

// Ask asks the agent at a socket; where nobody listens it tries again for as long as
// patience says. The error is always a *types.Error: of code 50 for STATUS and 11
// for the other commands where nobody listens, else the agent's.
func Ask(ctx context.Context, socket string, r *Request, patience time.Duration) (*types100.Result, error) {
	c, err := dial(ctx, socket, patience)
	if err != nil {
		return nil, absent(r.Command, socket, err)
	}
	defer c.Close()
	if deadline, bounded := ctx.Deadline(); bounded {
		_ = c.SetDeadline(deadline)
	}
	var a answer
	if err = send(c, r, r.Namespace); err == nil {
		_, err = receive(c, &a)
	}
	if err != nil {
		// What the agent did of it is not known: asked again, it goes on with that.
		return nil, absent(r.Command, socket, err)
	}
	if a.Error != nil {
		return nil, a.Error
	}
	return a.Result, nil
}

func dial(ctx context.Context, socket string, patience time.Duration) (*net.UnixConn, error) {
	for begun := time.Now(); ; {
		c, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
		if err == nil {
			return c.(*net.UnixConn), nil
		}
		if errors.Is(err, os.ErrPermission) || time.Since(begun) >= patience {
			return nil, err
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(askAgain):
		}
	}
}

// absent says that the agent does not answer, and what to do.
func absent(command, socket string, err error) *types.Error {
	code := types.ErrTryAgainLater
	if command == Status {
		code = types.ErrPluginNotAvailable // running pods go on: their network is in the kernel
	}
	return types.NewError(code, fmt.Sprintf("the millrace agent of this node does not answer: is it running (`millrace status`), and with the word pods (`millrace agent pods`)? ADD and DEL wait for it: %v", err),
		"socket "+socket)
}

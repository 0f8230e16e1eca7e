package cni

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
)

// Answer does what a request asks. An error that is a *types.Error goes to the runtime as
// it is, another one as an internal error. Only ADD has a result.
type Answer func(context.Context, *Request) (*types100.Result, error)

// mostAtOnce is how many requests are answered at once; others wait.
const mostAtOnce = 32

// answerWithin is how long an answer may take. Runtimes give up after minutes.
const answerWithin = 60 * time.Second

// Server answers plugins at a socket.
type Server struct {
	listener *net.UnixListener
	answer   Answer
}

// Listen opens the socket, in the place of one that nobody listens at any more. Only
// this user may connect. Requests wait until Serve.
func Listen(path string, answer Answer) (*Server, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("open CNI socket: make its folder: %w", err)
	}
	// Under another name until nobody else may connect: then all at once.
	next := path + ".next"
	if err := os.Remove(next); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("open CNI socket: %w", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: next, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("open CNI socket: %w", err)
	}
	l.SetUnlinkOnClose(false) // the next agent may have its own there by then
	if err = os.Chmod(next, 0o600); err == nil {
		err = os.Rename(next, path)
	}
	if err != nil {
		l.Close()
		return nil, fmt.Errorf("open CNI socket: %w", err)
	}
	return &Server{l, answer}, nil
}

// Serve answers until ctx ends; then it returns when what was begun has been answered.
func (s *Server) Serve(ctx context.Context) error {
	defer context.AfterFunc(ctx, func() { s.listener.Close() })()
	defer s.listener.Close()
	var working sync.WaitGroup
	defer working.Wait()
	places := make(chan struct{}, mostAtOnce)
	for {
		places <- struct{}{}
		c, err := s.listener.AcceptUnix()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("accept at the CNI socket: %w", err)
		}
		working.Go(func() {
			defer func() { <-places }()
			defer c.Close()
			s.serve(ctx, c)
		})
	}
}

// Close closes the socket without serving.
func (s *Server) Close() error { return s.listener.Close() }

func (s *Server) serve(ctx context.Context, c *net.UnixConn) {
	_ = c.SetDeadline(time.Now().Add(sayer))
	var r Request
	file, err := receive(c, &r)
	if err != nil {
		// Who says nothing that can be read gets an answer, if it still listens.
		_ = send(c, answer{Error: types.NewError(types.ErrDecodingFailure, "read the request: "+err.Error(), "")}, nil)
		return
	}
	if r.Namespace = file; file != nil {
		defer file.Close()
	}
	// Not cut off by the end of the agent: what is begun is done.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), answerWithin)
	defer cancel()
	result, err := s.answer(ctx, &r)
	_ = c.SetDeadline(time.Now().Add(sayer))
	_ = send(c, answer{result, asError(err)}, nil)
}

func asError(err error) *types.Error {
	var known *types.Error
	switch {
	case err == nil:
		return nil
	case errors.As(err, &known):
		return known
	}
	return types.NewError(types.ErrInternal, err.Error(), "")
}

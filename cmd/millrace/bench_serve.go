package main

import (
	"bytes"
	"context"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/bench"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/layer/service"
	"github.com/millrace/millrace/model"
)

// What serves in a benchmark is a process of its own, as the agent is: its memory
// can be told from the benchmark's, and nothing else happens in it. It reads an
// order, the Services of the order and then changed Services from its standard
// input, and writes an answer after the last of the former and each of the latter.

// serveOrder is what to serve; its Services follow one by one, so that no buffer
// of their whole length stays in the memory that is measured.
type serveOrder struct {
	Variant string
	Spec    bench.AttachSpec
	Count   int
}

// serveAnswer is the outcome of a load or of a change, or of another beginning.
type serveAnswer struct {
	Took                       time.Duration
	KernelBytes, ResidentBytes uint64
	// Error is empty or why it did not work, with the exit status of that.
	Error  string
	Status int
}

// attachers attach the layers under test.
func attachers() map[string]bench.Attach {
	attachers := map[string]bench.Attach{}
	for _, variant := range []string{bench.Millrace, bench.MillracePacket} {
		attachers[variant] = func(spec bench.AttachSpec) (bench.Attached, error) { return attachLayer(variant, spec) }
	}
	return attachers
}

// layerFor is the layer of a variant. Nothing is pinned: it ends with its
// process, however that ends.
func layerFor(variant string, spec bench.AttachSpec) (layer.Layer, error) {
	switch variant {
	case bench.Millrace:
		return service.New(service.Settings{Cgroup: spec.Cgroup}), nil
	case bench.MillracePacket:
		return service.New(service.Settings{Cgroup: spec.Cgroup, Netns: spec.NetNS, Path: service.PathPacket}), nil
	}
	return nil, fmt.Errorf("serve variant %q: no layer does that", variant)
}

// server is the process that serves, seen from the benchmark.
type server struct {
	command *exec.Cmd
	in      io.WriteCloser
	orders  *gob.Encoder
	answers *gob.Decoder
	said    bytes.Buffer
}

// attachLayer starts the process that serves and waits until it does.
func attachLayer(variant string, spec bench.AttachSpec) (bench.Attached, error) {
	s, err := startServer(&unix.SysProcAttr{})
	if err != nil {
		return bench.Attached{}, fmt.Errorf("start the process that serves: %w", err)
	}
	answer, err := s.load(variant, spec)
	if err != nil {
		return bench.Attached{}, errors.Join(err, s.close())
	}
	return bench.Attached{
		LoadTime: answer.Took, KernelBytes: answer.KernelBytes, ResidentBytes: answer.ResidentBytes,
		Change: func(changed *model.Service) (time.Duration, error) {
			answer, err := s.ask(changed)
			return answer.Took, err
		},
		Close: s.close,
	}, nil
}

func startServer(attributes *unix.SysProcAttr, what ...string) (*server, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	s := &server{command: exec.Command(self, append([]string{"bench", "serve"}, what...)...)}
	s.command.Stderr = &s.said
	attributes.Setpgid = true // Ctrl-C is for the benchmark
	s.command.SysProcAttr = attributes
	if s.in, err = s.command.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := s.command.StdoutPipe()
	if err != nil {
		return nil, err
	}
	s.orders, s.answers = gob.NewEncoder(s.in), gob.NewDecoder(out)
	return s, s.command.Start()
}

// startApart starts a process that serves what a specification says, with mounts of its
// own, so that what it pins is gone with it, however it ends; and waits until it serves.
func startApart(what string, spec any) (*server, error) {
	s, err := startServer(&unix.SysProcAttr{Unshareflags: unix.CLONE_NEWNS}, what)
	if err != nil {
		return nil, fmt.Errorf("start the process that serves: %w", err)
	}
	if _, err := s.ask(spec); err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

func (s *server) load(variant string, spec bench.AttachSpec) (serveAnswer, error) {
	services := spec.Services
	spec.Services = nil
	if err := s.orders.Encode(serveOrder{variant, spec, len(services)}); err != nil {
		return serveAnswer{}, s.lost(err)
	}
	for _, service := range services[:len(services)-1] {
		if err := s.orders.Encode(service); err != nil {
			return serveAnswer{}, s.lost(err)
		}
	}
	return s.ask(services[len(services)-1])
}

// ask sends an order, such as a Service, and waits for what comes of it.
func (s *server) ask(order any) (answer serveAnswer, err error) {
	if err = s.orders.Encode(order); err == nil {
		err = s.answers.Decode(&answer)
	}
	if err != nil {
		return answer, s.lost(err)
	}
	if answer.Error != "" {
		return answer, &failure{answer.Status, errors.New(answer.Error)}
	}
	return answer, nil
}

// lost says why the process is not there any more.
func (s *server) lost(cause error) error {
	s.in.Close()
	_ = s.command.Wait()
	return fmt.Errorf("the process that serves ended: %s: %s: %w", s.command.ProcessState, strings.TrimSpace(s.said.String()), cause)
}

// close ends the process, and with it what it attached.
func (s *server) close() error {
	if s.command.ProcessState != nil {
		return nil // it had ended, and somebody said so
	}
	s.in.Close()
	if err := s.command.Wait(); err != nil {
		return fmt.Errorf("end the process that serves: %w: %s", err, strings.TrimSpace(s.said.String()))
	}
	return nil
}

func benchServeCommand() *cobra.Command {
	c := command(&cobra.Command{
		Use:   "serve [dns|path]",
		Short: "The process that serves in a benchmark, which starts it",
		Args:  cobra.MaximumNArgs(1),
	}, inOwnSpaces, func(ctx context.Context, args []string) error {
		if len(args) > 0 && args[0] == "path" {
			return servePath(os.Stdin, os.Stdout)
		}
		if len(args) > 0 {
			return serveNames(ctx, os.Stdin, os.Stdout)
		}
		return serveBench(os.Stdin, os.Stdout)
	})
	c.Hidden = true
	return c
}

// serveUntilEnd is the other side of startApart: it reads what to serve, says whether that
// began, and returns when the input ends.
func serveUntilEnd(in io.Reader, out io.Writer, spec any, begin func() error) error {
	if err := gob.NewDecoder(in).Decode(spec); err != nil {
		return fmt.Errorf("read what to serve: %w", err)
	}
	answer := serveAnswer{}
	if err := begin(); err != nil {
		answer = refusal(err)
	}
	if err := gob.NewEncoder(out).Encode(answer); err != nil {
		return fmt.Errorf("answer the benchmark: %w", err)
	}
	_, err := io.Copy(io.Discard, in)
	return err
}

// serveBench does what the benchmark says until it says no more.
func serveBench(in io.Reader, out io.Writer) error {
	debug.SetGCPercent(50) // as in the agent
	orders, answers := gob.NewDecoder(in), gob.NewEncoder(out)
	var order serveOrder
	if err := orders.Decode(&order); err != nil {
		return fmt.Errorf("read what to serve: %w", err)
	}
	s := &serving{services: make([]*model.Service, order.Count)}
	for i := range s.services {
		if err := orders.Decode(&s.services[i]); err != nil {
			return fmt.Errorf("read Service %d of %d: %w", i+1, order.Count, err)
		}
	}
	var err error
	if s.layer, err = layerFor(order.Variant, order.Spec); err != nil {
		return err
	}
	debug.FreeOSMemory()
	answer := s.load()
	for {
		if err := answers.Encode(answer); err != nil {
			return fmt.Errorf("answer the benchmark: %w", err)
		}
		var changed *model.Service
		if err := orders.Decode(&changed); errors.Is(err, io.EOF) {
			return s.layer.Close()
		} else if err != nil {
			return fmt.Errorf("read what changed: %w", err)
		}
		answer = s.change(changed)
	}
}

// serving is a layer at work and what it serves.
type serving struct {
	layer    layer.Layer
	services []*model.Service
	have     layer.Picture
	number   uint64
}

// load brings all Services into the kernel, from nothing.
func (s *serving) load() serveAnswer {
	begun := time.Now()
	err := s.layer.Open()
	if err == nil {
		s.have, err = s.layer.Read()
	}
	if err == nil {
		err = s.apply()
	}
	answer := serveAnswer{Took: time.Since(begun)}
	if err != nil {
		return refusal(err)
	}
	debug.FreeOSMemory() // as the agent does after its first
	description, err := s.layer.Describe()
	if err != nil {
		return refusal(err)
	}
	for _, m := range description.Maps {
		answer.KernelBytes += m.Bytes
	}
	answer.ResidentBytes = residentBytes()
	return answer
}

// change puts a Service in the place of the one of its name.
func (s *serving) change(changed *model.Service) serveAnswer {
	services := slices.Clone(s.services) // a Snapshot is immutable
	i, found := slices.BinarySearchFunc(services, changed, func(a, b *model.Service) int { return a.Name.Compare(b.Name) })
	if !found {
		return refusal(fmt.Errorf("change Service %s: it is not served", changed.Name))
	}
	services[i], s.services = changed, services
	begun := time.Now()
	if err := s.apply(); err != nil {
		return refusal(err)
	}
	return serveAnswer{Took: time.Since(begun)}
}

// apply brings the kernel to what the Services ask for and reads it back.
func (s *serving) apply() (err error) {
	s.number++
	want := s.layer.Plan(&model.Snapshot{Number: s.number, Complete: true, Services: s.services})
	s.have, _, err = s.layer.Apply(s.have, want, s.layer.Diff(s.have, want, true))
	return err
}

func refusal(err error) serveAnswer {
	return serveAnswer{Error: err.Error(), Status: statusOf(&ran{err})}
}

// residentBytes is this process's VmRSS (proc_pid_status(5)), 0 if unknown.
func residentBytes() uint64 {
	data, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0
	}
	_, after, _ := strings.Cut(string(data), "VmRSS:")
	number, _, _ := strings.Cut(strings.TrimSpace(after), " ")
	kilobytes, _ := strconv.ParseUint(number, 10, 64)
	return kilobytes << 10
}

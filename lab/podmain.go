package lab

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"runtime/debug"
	"slices"
	"strconv"
	"time"

	"github.com/millrace/millrace/model"
)

// podSpec is what a pod's process is told on its standard input, as one line
// of JSON. When the input ends, the daemon is gone and the process ends too.
type podSpec struct {
	Name      model.Name
	Node      string
	Addresses []netip.Addr
	Ports     []model.ContainerPort
	// OwnNamespace: every address here is the pod's, so TCP may listen on all.
	OwnNamespace bool
	// Socket is the path of the unix socket on which it takes client work.
	Socket string
}

// podReport is what it answers on its standard output, one line of JSON: once,
// when it listens or cannot.
type podReport struct {
	Error string `json:"error,omitempty"`
}

// PodMain is the process of one pod: the hidden sub-command that Config's
// PodCommand names. It must be started inside the pod's cgroup and network
// namespace, because a socket belongs for ever to those of its creator. It
// returns the exit status: 0 when the daemon closed its input, 1 when it could
// not listen. args are for people who read the process list; what the process
// does is told on its standard input.
func PodMain(args []string) int {
	debug.SetGCPercent(20)
	input := bufio.NewReaderSize(os.Stdin, 4096)
	line, err := input.ReadBytes('\n')
	if err != nil {
		fmt.Fprintf(os.Stderr, "lab-pod: read what to do from standard input: %v: the lab starts this, not a person\n", err)
		return 1
	}
	var spec podSpec
	if err := json.Unmarshal(line, &spec); err != nil {
		fmt.Fprintf(os.Stderr, "lab-pod: read what to do: %v\n", err)
		return 1
	}
	err = servePod(&spec)
	var report podReport
	if err != nil {
		report.Error = err.Error()
	}
	if text, _ := json.Marshal(report); len(text) > 0 {
		os.Stdout.Write(append(text, '\n'))
	}
	if err != nil {
		return 1
	}
	debug.FreeOSMemory() // what starting up needed, 300 processes need not keep
	io.Copy(io.Discard, input)
	return 0
}

// servePod starts everything the pod does, in goroutines.
func servePod(spec *podSpec) error {
	if err := serveWork(spec); err != nil {
		return err
	}
	a := newAnswerer(spec)
	for _, port := range listenPorts(spec.Ports) {
		if err := servePort(spec, a, port); err != nil {
			return err
		}
	}
	return nil
}

// listenPorts leaves out ports that come again under another name.
func listenPorts(ports []model.ContainerPort) []model.ContainerPort {
	var once []model.ContainerPort
	for _, p := range ports {
		p.Name = ""
		if !slices.Contains(once, p) {
			once = append(once, p)
		}
	}
	return once
}

// serveWork takes client work on the pod's unix socket.
func serveWork(spec *podSpec) error {
	if err := os.Remove(spec.Socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("listen on %s: %w", spec.Socket, err)
	}
	listener, err := net.Listen("unix", spec.Socket)
	if err != nil {
		return fmt.Errorf("listen on %s: %w", spec.Socket, err)
	}
	if err := os.Chmod(spec.Socket, 0o600); err != nil {
		return fmt.Errorf("listen on %s: %w", spec.Socket, err)
	}
	server := &http.Server{Handler: workHandler(), ReadHeaderTimeout: 10 * time.Second}
	go server.Serve(listener)
	return nil
}

// plainTCP listens without Multipath TCP, which Go turns on for listeners and
// which no client here speaks.
var plainTCP = func() (c net.ListenConfig) {
	c.SetMultipathTCP(false)
	return c
}()

// servePort listens on one port. TCP takes every address of the pod's own
// namespace; UDP binds each address by itself, because an answer from a socket
// bound to all leaves from the first address, whichever was asked.
func servePort(spec *podSpec, a *answerer, port model.ContainerPort) error {
	hosts := make([]string, len(spec.Addresses))
	for i, addr := range spec.Addresses {
		hosts[i] = addr.String()
	}
	if port.Protocol == model.TCP && spec.OwnNamespace {
		hosts = []string{""}
	}
	number := strconv.Itoa(int(port.Port))
	for _, host := range hosts {
		address := net.JoinHostPort(host, number)
		switch port.Protocol {
		case model.TCP:
			listener, err := plainTCP.Listen(context.Background(), "tcp", address)
			if err != nil {
				return err
			}
			go a.serveTCP(listener)
		case model.UDP:
			conn, err := net.ListenPacket("udp", address)
			if err != nil {
				return err
			}
			go a.serveUDP(conn.(*net.UDPConn))
		}
	}
	return nil
}

package main

import (
	"bufio"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	servedAt = ":8080"
	askedAt  = ":8081"
	bye      = "bye"
)

// server answers with its name.
type server struct {
	name   string
	ending atomic.Bool
	ready  atomic.Bool
}

func serve(arguments []string) error {
	flags := flag.NewFlagSet("serve", flag.ExitOnError)
	linger := flags.Duration("linger", 10*time.Second, "how long to go on after SIGTERM")
	_ = flags.Parse(arguments) // ExitOnError: it does not return one
	name, err := os.Hostname()
	if err != nil {
		return err
	}
	s := &server{name: name}
	s.ready.Store(true)
	connections, err := net.Listen("tcp", servedAt)
	if err != nil {
		return err
	}
	datagrams, err := net.ListenPacket("udp", servedAt)
	if err != nil {
		return err
	}
	failed := make(chan error, 3)
	go func() { failed <- s.accept(connections) }()
	go func() { failed <- s.datagrams(datagrams) }()
	go func() { failed <- http.ListenAndServe(askedAt, s) }()
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, syscall.SIGTERM, syscall.SIGINT)
	select {
	case err := <-failed:
		return err
	case <-ended:
	}
	s.ending.Store(true)
	time.Sleep(*linger)
	return nil
}

// ServeHTTP says whether it is ready, or makes it so.
func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch r.URL.Path {
	case "/unready":
		s.ready.Store(false)
	case "/ready-again":
		s.ready.Store(true)
	default:
		if !s.ready.Load() {
			http.Error(w, "not ready", http.StatusServiceUnavailable)
		}
	}
}

func (s *server) answer(request string) string {
	answer := strings.TrimSpace(request) + " " + s.name
	if s.ending.Load() {
		answer += " " + bye
	}
	return answer + "\n"
}

func (s *server) accept(from net.Listener) error {
	for {
		connection, err := from.Accept()
		if errors.Is(err, syscall.ECONNABORTED) {
			continue
		}
		if err != nil {
			return err
		}
		go s.converse(connection)
	}
}

func (s *server) converse(connection net.Conn) {
	defer connection.Close()
	for lines := bufio.NewScanner(connection); lines.Scan(); {
		if _, err := fmt.Fprint(connection, s.answer(lines.Text())); err != nil {
			return
		}
	}
}

func (s *server) datagrams(on net.PacketConn) error {
	request := make([]byte, 1500)
	for {
		n, client, err := on.ReadFrom(request)
		if err != nil {
			return err
		}
		_, _ = on.WriteTo([]byte(s.answer(string(request[:n]))), client) // a client that has gone
	}
}

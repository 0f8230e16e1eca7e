package pack

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestRedact(t *testing.T) {
	for _, row := range []struct {
		text, want string
		removed    int
	}{
		{"net.ipv4.tcp_fastopen_key = 5b5b1e50-3f2a9c11", "net.ipv4.tcp_fastopen_key = [removed]", 1},
		{"net.core.somaxconn = 4096", "net.core.somaxconn = 4096", 0},
		{`{"token": "abc\"def", "secret_interval": 600}`, `{"token": "[removed]", "secret_interval": 600}`, 1},
		{`{"said": "DB_PASSWORD=hunter2 and \"apiKey\": \"xyz\" "}`, `{"said": "DB_PASSWORD=[removed] and \"apiKey\": \"[removed]\" "}`, 2},
		{"password: 'a b c'\nuser: me", "password: '[removed]'\nuser: me", 1},
		{"Authorization: Bearer abcdef123456", "Authorization: Bearer [removed]", 1},
		{"authorization=Basic dXNlcjpwYXNz more", "authorization=Basic [removed] more", 1},
		{"x eyJhbGciOiJSUzI1NiJ9.eyJpc3MiOiJrOHMifQ.c2ln y", "x [removed] y", 1},
		{"https://me:pass@registry.example/v2", "https://[removed]@registry.example/v2", 1},
		{"-----BEGIN RSA PRIVATE KEY-----\nMIIE\nabc=\n-----END RSA PRIVATE KEY-----\nafter",
			"-----BEGIN RSA PRIVATE KEY-----[removed]-----END RSA PRIVATE KEY-----\nafter", 1},
		{`{"k": "-----BEGIN PRIVATE KEY-----\nMIIE", "n": 1}`, `{"k": "-----BEGIN PRIVATE KEY-----[removed]", "n": 1}`, 1},
		{"-----BEGIN CERTIFICATE-----\nMIIE\n-----END CERTIFICATE-----", "-----BEGIN CERTIFICATE-----\nMIIE\n-----END CERTIFICATE-----", 0},
	} {
		got, removed := Redact(row.text)
		if got != row.want || removed != row.removed {
			t.Errorf("%q becomes %q with %d removed; not %q with %d", row.text, got, removed, row.want, row.removed)
		}
	}
}

// What was JSON is JSON, and nothing is taken out twice.
func FuzzRedact(f *testing.F) {
	for _, text := range []string{`{"password": "a\\"}`, `{"a": "token='x\"y"}`, `["://a:b@", "-----BEGIN PRIVATE KEY-----"]`, `"secret=\u0022x"`} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		out, _ := Redact(text)
		if json.Valid([]byte(text)) && !json.Valid([]byte(out)) {
			t.Errorf("%q was JSON, and %q is not", text, out)
		}
		if again, removed := Redact(out); removed > 0 {
			t.Errorf("of %q, made from %q, more is removed: %q", out, text, again)
		}
	})
}

// unpack reads an archive.
func unpack(t *testing.T, archive io.Reader) (files map[string]string, contents Contents) {
	t.Helper()
	z, err := gzip.NewReader(archive)
	if err != nil {
		t.Fatal(err)
	}
	files = map[string]string{}
	r := tar.NewReader(z)
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(r)
		if err != nil || h.Mode != 0o600 {
			t.Errorf("%s: mode %o, %v", h.Name, h.Mode, err)
		}
		files[strings.TrimPrefix(h.Name, "millrace-report/")] = string(content)
	}
	if err := json.Unmarshal([]byte(files["contents.json"]), &contents); err != nil {
		t.Fatal(err)
	}
	return files, contents
}

func TestArchive(t *testing.T) {
	root := t.TempDir()
	for name, value := range map[string]string{
		"net/core/somaxconn": "4096\n", "net/ipv4/tcp_rmem": "4096\t131072\t6291456\n", "net/ipv4/tcp_fastopen_key": "11111111-22222222\n",
		"net/ipv4/conf/all/rp_filter": "0\n", "net/ipv4/conf/veth1/rp_filter": "1\n", "net/ipv6/conf/all/stable_secret": "2001:db8::1\n", "kernel/hostname": "n1\n",
	} {
		if err := os.MkdirAll(filepath.Join(root, filepath.Dir(name)), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, name), []byte(value), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	says := func(text string, err error) func(context.Context) ([]byte, error) {
		return func(context.Context) ([]byte, error) { return []byte(text), err }
	}
	var archive bytes.Buffer
	err := Write(t.Context(), &archive, &Contents{Tool: "millrace report", Node: "n1", Time: time.Unix(1e9, 0)}, []Part{
		{"status.json", "millrace status", says(`{"token": "abc"}`, nil)},
		{"large.json", "millrace show", says(strings.Repeat("x", MostBytes+1), nil)},
		{"none.json", "millrace none", says("", errors.New("no agent, password=hunter2"))},
		Settings(root), Files("counters.txt", filepath.Join(root, "net/core/somaxconn"), filepath.Join(root, "absent")),
	}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	files, contents := unpack(t, &archive)
	if want := "net.core.somaxconn = 4096\nnet.ipv4.conf.all.rp_filter = 0\nnet.ipv4.tcp_rmem = 4096\t131072\t6291456\n"; files["sysctl.txt"] != want {
		t.Errorf("settings %q, not %q", files["sysctl.txt"], want)
	}
	for _, secret := range []string{"abc", "hunter2", "11111111", "2001:db8::1"} {
		for name, content := range files {
			if strings.Contains(content, secret) {
				t.Errorf("%s has the secret %s", name, secret)
			}
		}
	}
	if len(contents.Files) != 5 || contents.Files[0].Removed != 1 || !contents.Files[1].Cut || len(files["large.json"]) != MostBytes ||
		contents.Files[2].Error != "no agent, password=[removed]" || contents.Files[3].Error != "" || !strings.Contains(contents.Files[4].Error, "absent") {
		t.Errorf("contents %+v", contents.Files)
	}
	if _, there := files["none.json"]; there {
		t.Error("a part without content is a file")
	}
}

func TestArchiveThatCannotBeWritten(t *testing.T) {
	full := errors.New("disk full")
	reader, writer := io.Pipe()
	reader.CloseWithError(full)
	parts := []Part{{"a", "a", func(context.Context) ([]byte, error) { return []byte("text"), nil }}}
	if err := Write(t.Context(), writer, &Contents{}, parts, io.Discard); !errors.Is(err, full) {
		t.Errorf("onto a full disk: %v", err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Write(ended, io.Discard, &Contents{}, parts, io.Discard); !errors.Is(err, context.Canceled) {
		t.Errorf("interrupted: %v", err)
	}
}

package main

import (
	"archive/tar"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
)

// What the kubelet starts for each pod; its version is the one that Kubernetes'
// tests ask for.
const pauseImage = "registry.k8s.io/pause:3.10.2"

// callsImage is of our own program, in test/cluster/calls.
const callsImage = "localhost/calls:1"

func coreDNSImage() string {
	return "registry.k8s.io/coredns/coredns:" + version("github.com/coredns/coredns")
}

func imageFiles() []string {
	files, _ := filepath.Glob(folder + "/images/*.tar") // the pattern is not malformed
	return files
}

// images writes the images of the cluster, in the format of `docker save`, with
// the names that they have where they usually come from.
func images(bin string) error {
	to := folder + "/images"
	if err := os.MkdirAll(to, 0o755); err != nil {
		return err
	}
	number, err := os.ReadFile(filepath.Join(bin, "agnhost.version"))
	if err != nil {
		return err
	}
	agnhost, err := agnhostFiles(bin)
	if err != nil {
		return err
	}
	const e2e = "registry.k8s.io/e2e-test-images/"
	return errors.Join(
		image{[]string{pauseImage}, []string{"/pause"}, nil, files{{"pause", 0o755, fromFile(bin, "pause")}}}.write(to),
		image{[]string{coreDNSImage()}, []string{"/coredns"}, nil, files{{"coredns", 0o755, fromFile(bin, "coredns")}}}.write(to),
		image{[]string{callsImage}, []string{"/calls"}, nil, files{{"calls", 0o755, fromFile(bin, "calls")}}}.write(to),
		// Some tests want programs that are in here from other images.
		image{[]string{e2e + "agnhost:" + strings.TrimSpace(string(number)), e2e + "glibc-dns-testing:2.0.0",
			e2e + "busybox:1.37.0-1", "registry.k8s.io/build-image/distroless-iptables:v0.9.6"},
			[]string{"/agnhost"}, []string{"pause"}, agnhost}.write(to),
		image{[]string{e2e + "regression-issue-74839:1.4"}, []string{"/regression-issue-74839"}, nil,
			files{{"regression-issue-74839", 0o755, fromFile(bin, "regression-issue-74839")}}}.write(to))
}

// agnhostFiles are those that Kubernetes' image of that name has and tests use:
// a shell, and the programs that tests run in it, here of this Debian.
func agnhostFiles(bin string) (files, error) {
	all := files{
		{"tmp", fs.ModeDir | fs.ModeSticky | 0o777, nil}, {"uploads", fs.ModeDir | 0o777, nil},
		{"var/run", fs.ModeDir | 0o755, nil}, {"root", fs.ModeDir | 0o700, nil},
		{"agnhost", 0o755, fromFile(bin, "agnhost")}, {"coredns", 0o755, fromFile(bin, "coredns")},
		{"agnhost-2", fs.ModeSymlink, content("agnhost")},
		{"localhost.crt", 0o644, fromFile(bin, "localhost.crt")}, {"localhost.key", 0o644, fromFile(bin, "localhost.key")},
		{"etc/nsswitch.conf", 0o644, content("hosts: files dns\n")},
		{"etc/passwd", 0o644, content("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\nuser-defined-in-image:x:1000:1000::/:/bin/sh\n")},
		{"etc/group", 0o644, content("root:x:0:\ngroup-defined-in-image:x:50000:user-defined-in-image\n")},
	}
	have := map[string]bool{}
	add := func(name, path string) {
		if !have[name] {
			have[name] = true
			all = append(all, file{name, 0o755, fromFile(path)})
		}
	}
	// The shell is not busybox: busybox' prefers its own nc, which cannot do what
	// tests ask of it. Debian's static busybox crashes in wget, and GNU's would try
	// twenty times where tests expect one.
	all = append(all, file{"etc/wgetrc", 0o644, content("tries = 1\n")})
	var libraries []string
	for name, program := range map[string]string{
		"sh": "dash", "bash": "bash", "curl": "curl", "nc": "nc.openbsd", "wget": "wget", "ss": "ss", "dig": "dig", "ip": "ip",
		"getent": "getent", "conntrack": "conntrack",
	} {
		path, err := exec.LookPath(program)
		if err != nil {
			return nil, err
		}
		add("bin/"+name, path)
		needed, err := librariesOf(path)
		if err != nil {
			return nil, err
		}
		libraries = append(libraries, needed...)
	}
	for _, library := range libraries {
		add(strings.TrimPrefix(library, "/"), library)
		// libc loads this one by itself, when it is asked for a name.
		if filepath.Base(library) == "libc.so.6" {
			resolver := filepath.Join(filepath.Dir(library), "libnss_dns.so.2")
			add(strings.TrimPrefix(resolver, "/"), resolver)
		}
	}
	return addBusybox(all, have)
}

// librariesOf a program, with the loader, as ldd finds them.
func librariesOf(program string) (paths []string, err error) {
	text, err := output(exec.Command("ldd", program))
	for _, match := range regexp.MustCompile(`(?m)(/\S+) \(0x`).FindAllStringSubmatch(text, -1) {
		paths = append(paths, match[1])
	}
	return paths, err
}

// addBusybox fills in what the programs above do not bring.
func addBusybox(all files, have map[string]bool) (files, error) {
	path, err := exec.LookPath("busybox")
	if err != nil {
		return nil, err
	}
	applets, err := output(exec.Command(path, "--list"))
	if err != nil {
		return nil, err
	}
	all = append(all, file{"bin/busybox", 0o755, fromFile(path)})
	have["bin/busybox"] = true
	for _, applet := range strings.Fields(applets) {
		if name := "bin/" + applet; !have[name] {
			all = append(all, file{name, fs.ModeSymlink, content("busybox")})
		}
	}
	return all, nil
}

// file of an image: its path, its kind and permissions, and its bytes, or where a
// symbolic link leads.
type file struct {
	name string
	mode fs.FileMode
	from func() ([]byte, error)
}

type files []file

func fromFile(path ...string) func() ([]byte, error) {
	return func() ([]byte, error) { return os.ReadFile(filepath.Join(path...)) }
}

func content(text string) func() ([]byte, error) {
	return func() ([]byte, error) { return []byte(text), nil }
}

// image of one layer.
type image struct {
	names               []string
	entrypoint, command []string
	files               files
}

// write it to a folder, as pause.tar for registry.k8s.io/pause:3.10.2.
func (i image) write(folder string) error {
	name := filepath.Join(folder, strings.Split(path.Base(i.names[0]), ":")[0]+".tar")
	layer := name + ".layer"
	sum, err := i.files.write(layer)
	if err != nil {
		return fmt.Errorf("%s: %w", i.names[0], err)
	}
	defer os.Remove(layer)
	configuration, err := json.Marshal(map[string]any{
		"architecture": runtime.GOARCH, "os": "linux",
		"config": map[string]any{"Entrypoint": i.entrypoint, "Cmd": i.command, "WorkingDir": "/",
			"Env": []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{"sha256:" + sum}},
	})
	if err != nil {
		return err
	}
	own := sha256.Sum256(configuration)
	configurationName := hex.EncodeToString(own[:]) + ".json"
	manifest, err := json.Marshal([]map[string]any{{"Config": configurationName, "RepoTags": i.names, "Layers": []string{sum + ".tar"}}})
	if err != nil {
		return err
	}
	_, err = files{
		{sum + ".tar", 0o644, fromFile(layer)},
		{configurationName, 0o644, content(string(configuration))},
		{"manifest.json", 0o644, content(string(manifest))},
	}.write(name)
	return err
}

// write the files as a tar archive, with the folders above them, and return its
// SHA-256.
func (all files) write(name string) (sum string, err error) {
	out, err := os.Create(name)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	hash := sha256.New()
	archive := tar.NewWriter(io.MultiWriter(out, hash))
	var folders []string
	for _, f := range all {
		for above := path.Dir(f.name); above != "." && !slices.Contains(folders, above); above = path.Dir(above) {
			folders = append(folders, above)
		}
	}
	slices.Sort(folders)
	for _, f := range folders {
		if err := archive.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: f + "/", Mode: 0o755}); err != nil {
			return "", err
		}
	}
	for _, f := range all {
		if err := f.write(archive); err != nil {
			return "", fmt.Errorf("%s: %w", f.name, err)
		}
	}
	err = archive.Close()
	return hex.EncodeToString(hash.Sum(nil)), err
}

func (f file) write(archive *tar.Writer) error {
	header := &tar.Header{Typeflag: tar.TypeReg, Name: f.name, Mode: int64(f.mode.Perm())}
	if f.mode&fs.ModeSticky != 0 {
		header.Mode |= 0o1000
	}
	if f.mode.IsDir() {
		header.Typeflag, header.Name = tar.TypeDir, f.name+"/"
		return archive.WriteHeader(header)
	}
	bytes, err := f.from()
	if err != nil {
		return err
	}
	if f.mode&fs.ModeSymlink != 0 {
		header.Typeflag, header.Linkname, header.Mode = tar.TypeSymlink, string(bytes), 0o777
		return archive.WriteHeader(header)
	}
	header.Size = int64(len(bytes))
	if err := archive.WriteHeader(header); err != nil {
		return err
	}
	_, err = archive.Write(bytes)
	return err
}

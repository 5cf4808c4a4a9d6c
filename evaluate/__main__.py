"""python -m evaluate SUITE --predict_file FILE | python -m evaluate --predict_files FILE FILE ..."""

from evaluate.command import main

if __name__ == "__main__":
    main()
